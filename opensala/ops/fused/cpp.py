"""The fused elementwise steps by the compiled CPU kernels: one pass forwards; backwards the plain form is run
again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..native import library
from ..native.tensors import address, plain, threads
from .plain import plain_norm_gate, plain_norm_rope


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
            eps,
            threads(),
        )
        return out

    return _Fused.apply(kernel, lambda a, w, c, s: plain_norm_rope(a, w, c, s, eps), x, weight, cos, sin)


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
            eps,
            threads(),
        )
        return out

    return _Fused.apply(kernel, lambda a, w, g: plain_norm_gate(a, w, g, eps), x, weight, gate)
