"""The linear layer by the compiled CPU kernel (`ops/native/linear.cpp`): batch-invariant, float32, no
gradients."""

import torch
from torch import Tensor

from ..native import library
from ..native.tensors import address, inner_contiguous, kind, plain, threads


def cpp_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `linear`. Rows of x may be slices of wider rows; they are read where they lie."""
    inner, outer = x.shape[-1], weight.shape[0]
    rows = inner_contiguous(x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), inner))
    weight = weight.contiguous()
    if bias is not None:
        bias = plain(bias)
    out = torch.empty(*x.shape[:-1], outer, dtype=torch.float32)
    library().call(
        "opensala_linear",
        address(rows),
        address(weight),
        kind(weight),
        None,  # no codes: no scales, zeros and group
        None,
        1,
        address(bias),
        address(out),
        rows.shape[0],
        inner,
        outer,
        rows.stride(0),
        threads(),
    )
    return out
