"""What several ops ask of their arguments."""

import torch
from torch import Tensor


def head_dim_limit(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these head dimensions (the last ones), or None."""
    widest = max(x.shape[-1] for x in tensors)
    return f"the head dimension {widest} is above 256" if widest > 256 else None


def check_boundaries(name: str, cu_seqlens: Tensor, length: int) -> None:
    """Refuse document boundaries that are not integers in one row, or do not rise from 0 to the number of
    tokens.

    The numbers themselves are not looked at where they are on a GPU: that would make the CPU wait for it.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be [N + 1] boundaries, int32 or int64; got {list(cu_seqlens.shape)}, "
            f"{cu_seqlens.dtype}"
        )
    if cu_seqlens.is_cuda:
        return
    bounds = cu_seqlens.tolist()
    rising = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
    if not rising or bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(
            f"{name} must rise from 0 to {length} (the tokens given), got "
            f"{bounds[:8]}{'...' * (len(bounds) > 8)}"
        )
