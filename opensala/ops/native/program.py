"""Native calls written down once and made again in one go.

A decoding step makes the same calls on the same memory every time; only what lies in that memory changes. So
its calls are recorded while they are made for the first time, with the tensors they work on, and made again
without
Python between them: the same kernels on the same arguments, so the same bits. What is not a native call (an
operation of torch) cannot be made again; a recording that meets one is refused, with its name.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NEW_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class NotReplayable(RuntimeError):
    """Something else than a native call happened while calls were recorded."""


class Recording:
    """Calls in their order, and the tensors whose memory they use."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.kept: list[Tensor] = []

    def add(self, packed: int, types: Sequence[type], arguments: Sequence[Any]) -> None:
        """Write down a call of a packed function."""
        self.numbers += [packed, len(arguments)]
        self.numbers += [_bits(kind, value) for kind, value in zip(types, arguments, strict=True)]

    def program(self) -> "Program":
        return Program(self.numbers, self.kept)


class Program:
    """Recorded calls; `run` makes them again. It keeps the memory they use."""

    def __init__(self, numbers: Sequence[int], kept: list[Tensor]) -> None:
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self._kept = kept

    def run(self) -> None:
        from . import library

        library().call("opensala_replay", ctypes.addressof(self._numbers), len(self._numbers))


recording: Recording | None = None  # the one that is under way


@contextmanager
def record() -> Iterator[Recording]:
    """Native calls made within are made and written down.

    Raises:
        NotReplayable: torch computed something within; what was made so far was made.
    """
    global recording
    assert recording is None, "recordings do not nest"
    recording = Recording()
    try:
        with _NothingElse():
            yield recording
    finally:
        recording = None


class _NothingElse(TorchDispatchMode):
    """Lets torch make new memory and look at memory that is there, and nothing more."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func._schema.is_mutable:
            raise NotReplayable(f"torch's {name} runs within")
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        if name not in _NEW_MEMORY:
            seen = {_memory(x) for x in tree_leaves(args) if isinstance(x, Tensor)}
            if not tensors or not all(_memory(x) in seen for x in tensors):
                raise NotReplayable(f"torch's {name} runs within")
        if recording is not None:  # memory that a call may use: it must not be given to another tensor
            recording.kept += tensors
        return made


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _bits(kind: type, value: Any) -> int:
    """An argument as the 64 bits in which a packed function takes it."""
    if kind is ctypes.c_float:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if isinstance(value, ctypes.c_void_p):
        return value.value or 0
    return 0 if value is None else int(value)
