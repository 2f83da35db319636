"""What the tests of all ops share: the backends this machine can run, and how closely each has to agree with
float64."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class BackendCase:
    """A backend, the device and dtype its kernels run in, and the error allowed relative to the largest
    element."""

    name: str
    device: str
    dtype: torch.dtype
    tolerance: float

    def cast(self, x: Any) -> Any:
        """Floating tensors in this case's dtype, all tensors on its device; other things as they are."""
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)

    def compare(self, run: Any, wanted: list[torch.Tensor], *inputs: Any) -> None:
        """Run on `inputs` in this dtype and hold every result against `wanted`, which is float64."""
        got = run(*(self.cast(x) for x in inputs))
        for n, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_close(a, b, self.tolerance, f"result {n}")


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, name: str = "") -> None:
    """The largest difference, relative to the largest element wanted (at least 1), is below the tolerance; no
    NaN."""
    assert got.shape == wanted.shape, f"{name}: {list(got.shape)} instead of {list(wanted.shape)}"
    error = (
        ((got.cpu().double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=1)).item()
        if wanted.numel()
        else 0.0
    )
    assert error < tolerance, f"{name}: {error:.2e} is not below {tolerance:.0e}"


# What makes the CPU wait for a GPU: values that come to Python, and shapes that depend on values.
WAITS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"),
    *("masked_select", "unique", "tensor", "as_tensor"),
}


class _Calls(TorchFunctionMode):
    def __init__(self, watched: list[bool]) -> None:
        self.watched = watched

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert not (self.watched[0] and name in WAITS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, watched: list[bool]) -> None:
        super().__init__()
        self.watched = watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in {"_local_scalar_dense", *WAITS} or (
            name in ("index", "index_put", "index_put_")
            and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        )
        assert not (self.watched[0] and waits), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Within the block, the Python around Triton kernels may not read a value back from the device.

    Holds on a CPU as well, where the kernels run in Triton's interpreter; that itself is not looked at.
    """
    if torch.cuda.is_available():
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    from triton.runtime.interpreter import GridExecutor

    watched, launch = [True], GridExecutor.__call__

    def unwatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        watched[0] = False
        try:
            return launch(self, *args, **kwargs)
        finally:
            watched[0] = True

    with patch.object(GridExecutor, "__call__", unwatched), _Calls(watched), _Operators(watched):
        yield


# float64 against float64: two orders of the same sums, 1e-11 is two digits above what is seen.
# float32: 2e-5, sums of some hundred products of order one. Triton multiplies float32 in full precision (no
# tf32).
BACKENDS = [
    pytest.param(BackendCase("torch", "cpu", torch.float64, 1e-11), id="torch"),
    pytest.param(BackendCase("cpp", "cpu", torch.float32, 2e-5), id="cpp"),
    pytest.param(
        BackendCase("triton", TRITON_DEVICE, torch.float32, 2e-5),
        id="triton",
        marks=[pytest.mark.triton, pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")],
    ),
]
