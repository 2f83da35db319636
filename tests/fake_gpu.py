"""A GPU that computes nothing: tensors of device `cuda` without memory, kernels that are noted down and not
run. The Python of a GPU run is real; so are shapes, dtypes, devices, and the bytes that would be allocated.

What would wait for a GPU (a value that comes to Python) or mixes devices raises, as in any fake tensor; but
for `tolist`, which gives ones and is counted.
"""

import os
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.engine import capture as capture_module
from opensala.model import batch as batch_module
from opensala.model import layers as layers_module
from opensala.ops import backends

from .ops.kernels import triton_modules

CUDA = torch.device("cuda", 0)
_ATEN = torch.ops.aten
_NEW_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class FakeGPU:
    """What was asked of the GPU: launches in order, host tensors that were made, bytes allocated."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.arguments: list[tuple[str, dict[str, torch.dtype]]] = []  # of Triton kernels: dtypes by name
        self.host_tensors: list[str] = []
        self.uploads = self.reads = 0  # copies of integers to the device, and of values from it
        self.total = 1 << 40  # bytes of memory, as the driver tells
        self.allocated = self.peak = 0
        self._seen: set[int] = set()

    def forget(self) -> None:
        """Start counting again; bytes go on."""
        self.launches, self.arguments, self.host_tensors = [], [], []
        self.uploads = self.reads = 0
        self.peak = self.allocated

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.launches)

    def note(self, tensor: torch.Tensor) -> None:
        """A tensor came to be: count its memory once, until it is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.allocated += -(-size // 512) * 512  # as CUDA's allocator rounds
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.allocated -= -(-size // 512) * 512


class _Operators(TorchDispatchMode):
    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        if name not in _NEW_MEMORY and not view and any(x.device == CUDA for x in tensors):
            self.gpu.launches.append(name)
        for x in tensors:
            if x.device == CUDA:
                self.gpu.note(x)
            elif x.device.type == "cpu":
                self.gpu.host_tensors.append(name)
        return made


class _Methods(TorchFunctionMode):
    """Indexing and copying ask for the device in C++, where there is none: done by operators here."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return _item(*args)
        if func is torch.Tensor.copy_:
            self.gpu.launches.append("copy_")
            return args[0]
        if func is torch.Tensor.__setitem__:
            self.gpu.launches.append("copy_")
            return None
        return func(*args, **(kwargs or {}))


def _item(x: torch.Tensor, key: Any) -> torch.Tensor:
    keys = key if isinstance(key, tuple) else (key,)
    rest = sum(k is not None and k is not Ellipsis for k in keys)
    place, picks = 0, []
    for k in keys:
        if k is None:
            x, place = _ATEN.unsqueeze(x, place), place + 1
            continue
        if k is Ellipsis:
            place = x.dim() - rest
            continue
        rest -= 1
        if isinstance(k, slice):
            x = _ATEN.slice(x, place, *k.indices(x.shape[place]))
        elif isinstance(k, int):
            x = _ATEN.select(x, place, k)
            continue
        else:
            picks += [None] * (place - len(picks)) + [k]
        place += 1
    return _ATEN.index(x, picks) if picks else x


class _Host:
    """Integers in main memory that can be sent."""

    def __init__(self, size: int) -> None:
        self.array = np.zeros(size, np.int32)

    def numpy(self) -> np.ndarray:
        return self.array


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Within the block, tensors on `cuda` can be made and computed with: an H100 without numbers."""
    gpu = FakeGPU()

    def send(host: _Host, device: torch.device, into: torch.Tensor | None = None) -> torch.Tensor:
        gpu.uploads += 1
        return into if into is not None else torch.empty(len(host.array), dtype=torch.int32, device=device)

    def read(tensor: torch.Tensor) -> Any:
        gpu.reads += 1
        return np.ones(tensor.shape).tolist()

    def launched(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = {n: x for n, x in names.items() if isinstance(x, torch.Tensor)}
        wrong = [n for n, x in tensors.items() if x.device != CUDA]
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        assert not wrong, f"{name}: {wrong} are not on the GPU"
        gpu.launches.append(name)
        gpu.arguments.append((name, {n: x.dtype for n, x in tensors.items()}))

    triton_modules()  # before the variable below changes
    with ExitStack() as stack:
        import triton.runtime.interpreter
        import triton.runtime.jit

        for target, name, value in (
            (torch.cuda, "device", lambda *_: nullcontext()),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132)),
            (FakeTensor, "tolist", read),
            (backends, "_why_not_triton", lambda *_: None),
            (layers_module, "runs_alone", lambda *_: not torch.is_grad_enabled()),
            (torch.cuda, "mem_get_info", lambda *_: (gpu.total - gpu.allocated, gpu.total)),
            (batch_module, "host_numbers", lambda size, device: _Host(size)),
            (batch_module, "send", send),
            (capture_module, "host_numbers", lambda size, device: _Host(size)),
            (capture_module, "send", send),
            (capture_module, "CudaRecorder", lambda device: capture_module.CallAgain()),
            (triton.runtime.interpreter.InterpretedFunction, "run", launched),
            (triton.runtime.jit.JITFunction, "run", launched),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch.dict(os.environ, {"TRITON_INTERPRET": "0"}))
        stack.enter_context(torch.no_grad())
        for mode in (FakeTensorMode(), _Operators(gpu), _Methods(gpu)):
            stack.enter_context(mode)
        yield gpu


def on_fake_gpu(config: MiniCPMSALAConfig, dtype: torch.dtype = torch.bfloat16) -> MiniCPMSALAForCausalLM:
    """A model whose parameters are on the fake GPU; call within `fake_gpu`."""
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config).eval()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data = torch.empty(parameter.shape, dtype=dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(data, requires_grad=False)
    return model
