"""The fused elementwise steps in PyTorch's own operators: right on any device, with autograd; several
passes."""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def plain_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """See `norm_rope`; the result is float32 (float64 for float64)."""
    x = _norm(_wide(x), weight, eps)
    if cos is None or sin is None:
        return x
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def plain_norm_gate(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    """See `norm_gate`; the result is float32 (float64 for float64)."""
    x = _norm(_wide(x), weight, eps)
    return x if gate is None else x * torch.sigmoid(_wide(gate))


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`; the result is float32 (float64 for float64)."""
    return _norm(_wide(x), weight, eps)


def plain_add_rms_norm(
    x: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`; the results are float32 (float64 for float64)."""
    total = _wide(x) + scale * _wide(y)
    return total, _norm(total, weight, eps)


def plain_add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """See `add_scaled`; the result is float32 (float64 for float64)."""
    return _wide(x) + scale * _wide(y)


def plain_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `silu_mul`; the result is float32 (float64 for float64)."""
    return torch.nn.functional.silu(_wide(gate)) * _wide(up)
