"""The fused elementwise steps by the compiled CPU kernels: one pass forwards; backwards the plain form is run
again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..native import library
from ..native.tensors import address, plain, threads
from .plain import (
    plain_add_rms_norm,
    plain_add_scaled,
    plain_norm_gate,
    plain_norm_rope,
    plain_rms_norm,
    plain_silu_mul,
)


class _Fused(torch.autograd.Function):
    """Forward by `kernel`, backward through `reference`; both take the tensors, float32 or None."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *tensors: Tensor | None
    ) -> Tensor:
        ctx.reference = reference
        ctx.save_for_backward(*tensors)
        return kernel(*(None if x is None else plain(x) for x in tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        leaves = [
            None if x is None else x.detach().requires_grad_(w)
            for x, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.reference(*leaves)
        inputs = [x for x in leaves if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(out, inputs, grads[0].to(out.dtype)))
        return None, None, *(next(found) if w else None for w in wanted)


def _run(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """The kernel, with a gradient only where one is wanted: autograd's bookkeeping costs more than a decoding
    step's work."""
    if torch.is_grad_enabled():
        return _Fused.apply(kernel, reference, *tensors)
    return kernel(*(None if x is None else plain(x) for x in tensors))


def cpp_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """See `norm_rope`; the result is float32."""

    def kernel(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        batch, length, heads, dim = x.shape
        out = torch.empty_like(x)
        period = length if cos is None or cos.shape[0] == 1 else batch * length
        library().call(
            "opensala_norm_rope",
            address(x),
            address(weight),
            address(cos),
            address(sin),
            address(out),
            batch * length,
            heads,
            dim,
            period,
            float(eps),
            threads(),
        )
        return out

    return _run(kernel, lambda a, w, c, s: plain_norm_rope(a, w, c, s, eps), x, weight, cos, sin)


def cpp_norm_gate(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    """See `norm_gate`; the result is float32."""

    def kernel(x: Tensor, weight: Tensor | None, gate: Tensor | None) -> Tensor:
        out = torch.empty_like(x)
        library().call(
            "opensala_norm_gate",
            address(x),
            address(weight),
            address(gate),
            address(out),
            x.numel() // x.shape[-1],
            x.shape[-1],
            float(eps),
            threads(),
        )
        return out

    return _run(kernel, lambda a, w, g: plain_norm_gate(a, w, g, eps), x, weight, gate)


def cpp_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`; the result is float32."""

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        width = x.shape[-1]
        places = address(x), address(weight), address(out)
        library().call("opensala_rms_norm", *places, x.numel() // width, width, float(eps), threads())
        return out

    return _run(kernel, lambda a, w: plain_rms_norm(a, w, eps), x, weight)


def cpp_add_rms_norm(x: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`; the results are float32. The compiled form has no gradient."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, weight)):
        return plain_add_rms_norm(x, y, scale, weight, eps)
    x, y, weight = plain(x), plain(y), plain(weight)
    total, out, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    places = (address(t) for t in (x, y, weight, total, out))
    rows = x.numel() // width
    library().call("opensala_add_rms_norm", *places, rows, width, float(scale), float(eps), threads())
    return total, out


def cpp_add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """See `add_scaled`; the result is float32."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        library().call(
            "opensala_add_scaled", address(x), address(y), address(out), x.numel(), float(scale), threads()
        )
        return out

    return _run(kernel, lambda a, b: plain_add_scaled(a, b, scale), x, y)


def cpp_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `silu_mul`; the result is float32."""

    def kernel(gate: Tensor, up: Tensor) -> Tensor:
        out, width = torch.empty_like(gate), gate.shape[-1]
        places = address(gate), address(up), address(out)
        library().call("opensala_silu_mul", *places, gate.numel() // width, width, threads())
        return out

    return _run(kernel, plain_silu_mul, gate, up)
