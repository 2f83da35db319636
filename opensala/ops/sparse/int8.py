"""Rows of keys and values in eight bits.

A row is one token's key or value of one head: D integers of -127 ... 127, and behind them, in four bytes, the
float32 scale by which each is multiplied. Every row has a scale of its own, because it is the only unit that
arrives whole: a scale for a page would either round the page's earlier tokens again with each token that
joins them, or give a token other bits when its page is full than before, so that an answer depended on how
the text was cut into calls. The price is 4 bytes in D + 4.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4
MOST = 127.0  # symmetric: -128 is not used


def pack_rows(x: Tensor) -> Tensor:
    """Rows `[..., D]` of any float type as int8 `[..., D + 4]`, rounded to nearest, ties to even.

    What is not finite makes the whole row NaN, so that it is seen when it is used.
    """
    wide = x.to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True) / MOST
    usable = (scale > 0) & scale.isfinite()
    rounded = (wide / scale).round().clamp(-MOST, MOST)
    values = torch.where(usable, rounded, 0.0).to(torch.int8)
    return torch.cat([values, scale.contiguous().view(torch.int8)], -1)


def unpack_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack_rows` made of rows, `[..., D]`: exact in float32, rounded to `dtype` once."""
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-SCALE_BYTES].to(torch.float32) * scale).to(dtype)
