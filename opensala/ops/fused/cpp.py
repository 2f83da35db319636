"""The fused elementwise steps by the compiled CPU kernels: one pass over memory forwards, one backwards.

Tensors come and go in float32 or in 16 bits, and are widened and rounded on the way; work is in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..native import library
from ..native.tensors import KINDS, address, kind, plain, threads
from .cpp_back import add_scaled_back, norm_gate_back, norm_rope_back, silu_mul_back


def _stored(x: Tensor) -> Tensor:
    """x contiguous, as a kernel reads it."""
    x = x.detach() if x.requires_grad else x
    return x.contiguous() if x.dtype in KINDS else x.float().contiguous()


def _learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted: autograd's bookkeeping costs more than a decoding step's work."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def cpp_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """See `norm_rope`; the result is of `dtype`."""
    if _learns(x, weight):
        return _NormRope.apply(x, weight, cos, sin, eps, dtype)
    return _norm_rope(x, weight, cos, sin, eps, dtype)


def _norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    x, (weight, cos, sin) = _stored(x), (None if t is None else plain(t) for t in (weight, cos, sin))
    batch, length, heads, dim = x.shape
    out = torch.empty_like(x, dtype=dtype)
    period = length if cos is None or cos.shape[0] == 1 else batch * length
    library().call(
        "opensala_norm_rope",
        address(x),
        kind(x),
        address(weight),
        address(cos),
        address(sin),
        address(out),
        kind(out),
        batch * length,
        heads,
        dim,
        period,
        float(eps),
        threads(),
    )
    return out


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return _norm_rope(x, weight, cos, sin, eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        return *norm_rope_back(_stored(x), weight, cos, sin, ctx.eps, _stored(grads[0]), wanted), *[None] * 4


def cpp_norm_gate(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """See `norm_gate`; the result is of `dtype`."""
    if _learns(x, weight, gate):
        return _NormGate.apply(x, weight, gate, eps, dtype)
    return _norm_gate(x, weight, gate, eps, dtype)


def _norm_gate(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    x, weight = _stored(x), None if weight is None else plain(weight)
    gate, out = None if gate is None else _stored(gate), torch.empty_like(x, dtype=dtype)
    library().call(
        "opensala_norm_gate",
        address(x),
        kind(x),
        address(weight),
        address(gate),
        0 if gate is None else kind(gate),
        address(out),
        kind(out),
        x.numel() // x.shape[-1],
        x.shape[-1],
        float(eps),
        threads(),
    )
    return out


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.eps = eps
        return _norm_gate(x, weight, gate, eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        gate = None if gate is None else _stored(gate)
        wanted = ctx.needs_input_grad[:3]
        return *norm_gate_back(_stored(x), weight, gate, ctx.eps, _stored(grads[0]), wanted), None, None


def cpp_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`; the result is float32."""
    if _learns(x, weight):
        return cpp_norm_gate(x, weight, None, eps, torch.float32)
    x, weight, width = plain(x), plain(weight), x.shape[-1]
    out = torch.empty_like(x)
    places = address(x), address(weight), address(out)
    library().call("opensala_rms_norm", *places, x.numel() // width, width, float(eps), threads())
    return out


def cpp_add_rms_norm(
    x: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`; the sum is of x's dtype, its norm of `dtype`."""
    if _learns(x, y, weight):
        return _AddNorm.apply(x, y, scale, weight, eps, dtype)
    return _add_rms_norm(x, y, scale, weight, eps, dtype)


def _add_rms_norm(
    x: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x, y, weight, width = _stored(x), _stored(y), plain(weight), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    library().call(
        "opensala_add_rms_norm",
        address(x),
        kind(x),
        address(y),
        kind(y),
        address(weight),
        address(total),
        address(out),
        kind(out),
        x.numel() // width,
        width,
        float(scale),
        float(eps),
        threads(),
    )
    return total, out


class _AddNorm(torch.autograd.Function):
    """The norm's gradient is taken at the sum as it was rounded, as where sum and norm are two steps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, out = _add_rms_norm(x, y, scale, weight, eps, dtype)
        ctx.save_for_backward(total, weight)
        ctx.scale, ctx.eps, ctx.dtypes = scale, eps, (x.dtype, y.dtype)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dtotal, dout = (_stored(x) for x in grads)
        wanted = True, ctx.needs_input_grad[3], False
        dx, dweight, _ = norm_gate_back(total, weight, None, ctx.eps, dout, wanted, dtotal)
        assert dx is not None
        dx, dy = add_scaled_back(dx, ctx.scale, ctx.dtypes, ctx.needs_input_grad[:2])
        return dx, dy, None, dweight, None, None


def cpp_add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """See `add_scaled`; the result is of x's dtype."""
    if _learns(x, y):
        return _AddScaled.apply(x, y, scale)
    return _add_scaled(x, y, scale)


def _add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    x, y, width = _stored(x), _stored(y), max(1, x.shape[-1]) if x.dim() else 1
    out = torch.empty_like(x)
    places = address(x), kind(x), address(y), kind(y), address(out)
    library().call("opensala_add_scaled", *places, x.numel() // width, width, float(scale), threads())
    return out


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtypes = scale, (x.dtype, y.dtype)
        return _add_scaled(x, y, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *add_scaled_back(grads[0], ctx.scale, ctx.dtypes, ctx.needs_input_grad[:2]), None


def cpp_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `silu_mul`; the result is of gate's dtype."""
    up = up.to(gate.dtype)
    return _SiluMul.apply(gate, up) if _learns(gate, up) else _silu_mul(gate, up)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up, width = _stored(gate), _stored(up), gate.shape[-1]
    out = torch.empty_like(gate)
    places = address(gate), address(up), address(out), kind(gate)
    library().call("opensala_silu_mul", *places, gate.numel() // width, width, threads())
    return out


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_mul(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (_stored(x) for x in ctx.saved_tensors)
        return silu_mul_back(gate, up, _stored(grads[0]), ctx.needs_input_grad)
