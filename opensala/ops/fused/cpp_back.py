"""The gradients of the fused elementwise steps by the compiled CPU kernels (`ops/native/fused_back.cpp`).

Tensors are contiguous and float32 or of 16 bits; each gradient has the dtype of what it is the gradient of.
`wanted` says which of the gradients are made; None stands in the place of the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import library
from ..native.tensors import address, kind, plain, threads

_LANES = (
    16  # what a thread sums a weight's gradient in is filled up to a multiple of it, as the kernels expect
)


def _sums(weight: Tensor) -> Tensor:
    """Zeros `[threads, width]`, each row for the gradient of a weight by one thread."""
    return torch.zeros(threads(), -(-len(weight) // _LANES) * _LANES)


def _summed(sums: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if sums is None or weight is None:
        return None
    return sums.sum(0)[: len(weight)].to(weight.dtype)


def norm_rope_back(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    grad: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x `[B, T, H, D]` and the weight of `norm_rope`, from the one of its result."""
    batch, length, heads, dim = x.shape
    cos, sin = (None if t is None else plain(t) for t in (cos, sin))
    period = length if cos is None or cos.shape[0] == 1 else batch * length
    dx = torch.empty_like(x) if wanted[0] else None
    sums = _sums(weight) if weight is not None and wanted[1] else None
    factors = None if weight is None else plain(weight)
    library().call(
        "opensala_norm_rope_back",
        address(x),
        kind(x),
        address(factors),
        address(cos),
        address(sin),
        address(grad),
        kind(grad),
        address(dx),
        kind(x),
        address(sums),
        batch * length,
        heads,
        dim,
        period,
        float(eps),
        threads(),
    )
    return dx, _summed(sums, weight)


def norm_gate_back(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    grad: Tensor,
    wanted: Sequence[bool],
    more: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x `[..., W]`, the weight and the gate of `norm_gate`, from the one of its result.

    `more` is a gradient that x has from elsewhere, and is added to its own.
    """
    dx = torch.empty_like(x) if wanted[0] else None
    dgate = torch.empty_like(gate) if gate is not None and wanted[2] else None
    sums = _sums(weight) if weight is not None and wanted[1] else None
    factors = None if weight is None else plain(weight)
    library().call(
        "opensala_norm_gate_back",
        address(x),
        kind(x),
        address(factors),
        address(gate),
        0 if gate is None else kind(gate),
        address(grad),
        kind(grad),
        address(more),
        0 if more is None else kind(more),
        address(dx),
        kind(x),
        address(dgate),
        address(sums),
        x.numel() // x.shape[-1],
        x.shape[-1],
        float(eps),
        threads(),
    )
    return dx, _summed(sums, weight), dgate


def add_scaled_back(
    grad: Tensor, scale: float, dtypes: Sequence[torch.dtype], wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and y, of `dtypes`, of x + scale * y."""
    dx = grad.to(dtypes[0]) if wanted[0] else None
    dy = (grad if scale == 1.0 else grad * scale).to(dtypes[1]) if wanted[1] else None
    return dx, dy


def silu_mul_back(
    gate: Tensor, up: Tensor, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gate and up, both of one dtype, of silu(gate) * up."""
    dgate, dup = (torch.empty_like(x) if w else None for x, w in zip((gate, up), wanted, strict=True))
    places = address(gate), address(up), kind(gate), address(grad), kind(grad), address(dgate), address(dup)
    width = gate.shape[-1]
    library().call("opensala_silu_mul_back", *places, gate.numel() // width, width, threads())
    return dgate, dup
