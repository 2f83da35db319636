"""What the operating system is told of the pool's memory on a CPU: to take it in small pieces, and to take it
back.

numpy asks for huge pages (2 MiB) for large arrays: right for memory that is filled from end to end, wrong for
one in which a page of a context here and there is filled, as each would cost 2 MiB to clear and to keep.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

_NO_HUGE_PAGES = getattr(mmap, "MADV_NOHUGEPAGE", None)  # Linux only
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    try:
        found = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):  # no such call here
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def _advise(memory: Tensor, advice: int | None) -> bool:
    """Tell about the whole pages of the system within a contiguous tensor; whether it was taken."""
    call, size = _madvise(), mmap.PAGESIZE
    if call is None or advice is None or memory.device.type != "cpu":
        return False
    begin = -(-memory.data_ptr() // size) * size
    end = (memory.data_ptr() + memory.numel() * memory.element_size()) // size * size
    return end > begin and call(begin, end - begin, advice) == 0


def in_small_pieces(memory: Tensor) -> None:
    """Take memory for this tensor in small pages."""
    _advise(memory, _NO_HUGE_PAGES)


def give_back(memory: Tensor) -> None:
    """Let the system have the memory of a tensor whose content is no longer needed; it reads as zeros after
    that, or as it was where the system does not take it."""
    _advise(memory, _DONT_NEED)
