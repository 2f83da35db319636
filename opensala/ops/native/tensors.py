"""From tensors to what the compiled kernels take: addresses, element types, thread counts."""

import ctypes

import torch
from torch import Tensor

from . import program

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def address(x: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's first element lies; the caller keeps the tensor alive during the call."""
    if program.recording is not None and x is not None:
        program.recording.kept.append(x)
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def kind(x: Tensor) -> int:
    """Number by which the kernels know the element type."""
    return KINDS[x.dtype]


def inner_contiguous(x: Tensor) -> Tensor:
    """x with neighbouring elements of the last dimension next to each other in memory; copied only if they
    are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def plain(x: Tensor) -> Tensor:
    """x as contiguous float32; x itself if it is that and no gradient is wanted."""
    if x.dtype == torch.float32 and x.is_contiguous() and not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return x.detach().to(torch.float32).contiguous()


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
