"""Reference implementations of the fused elementwise steps, in the dtype they are given (call in float64)."""

import torch
from torch import Tensor


def naive_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x itself without a weight."""
    return x if weight is None else x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def naive_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """Element i of a head and element i + D/2 are the coordinates of a point turned by angle i."""
    x = naive_norm(x, weight, eps)
    if cos is None or sin is None:
        return x
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        c, s = cos[:, :, None, i], sin[:, :, None, i]
        out[..., i], out[..., i + half] = a * c - b * s, b * c + a * s
    return out


def naive_norm_gate(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    """norm(x) / (1 + exp(-gate))."""
    x = naive_norm(x, weight, eps)
    return x if gate is None else x / (1 + torch.exp(-gate))


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return naive_norm(x, weight, eps)


def naive_add_rms_norm(
    x: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + scale * y, and its norm."""
    total = x + scale * y
    return total, naive_norm(total, weight, eps)


def naive_add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """x + scale * y."""
    return x + scale * y


def naive_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up."""
    return gate / (1 + torch.exp(-gate)) * up
