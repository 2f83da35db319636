"""Lightning attention by the compiled CPU kernel (`ops/native/lightning.cpp`), forward and backward, in
float32.

The gradient of a decayed linear recurrence is a decayed linear recurrence: the backward pass runs the same
kernel twice, once forwards for the queries, once from the last token to the first (negative strides) for keys
and values, which share one state.

Shapes: B rows, T tokens, H heads, D/E key/value dim, N sequences.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..native import library
from ..native.tensors import address, plain, threads


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, bounds: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """q, k `[T, H, D]`, v `[T, H, E]` contiguous float32, all rows of a batch or all documents behind one
    another."""
    out, final = torch.empty_like(v), torch.empty_like(state)
    library().call(
        "opensala_lightning",
        address(q),
        address(k),
        address(v),
        address(out),
        None,
        None,
        address(decay),
        address(state),
        address(final),
        _bounds(bounds),
        len(bounds) - 1,
        *k.shape[1:],
        v.shape[-1],
        0,
        scale,
        threads(),
    )
    return out, final


def _run_back(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, decay: Tensor, seed: Tensor, bounds: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and what the recurrence backwards in time, begun with `seed` `[N, H, D, E]`, leaves at the first
    tokens."""
    dk, dv, last = torch.empty_like(k), torch.empty_like(v), torch.empty_like(seed)

    def end(x: Tensor) -> ctypes.c_void_p:  # the last token's row
        return ctypes.c_void_p(x[-1].data_ptr())

    turned = [bounds[-1] - b for b in reversed(bounds)]
    library().call(
        "opensala_lightning",
        end(k),
        end(q),
        end(do),
        end(dv),
        end(v),
        end(dk),
        address(decay),
        address(seed),
        address(last),
        _bounds(turned),
        len(bounds) - 1,
        *k.shape[1:],
        v.shape[-1],
        1,
        scale,
        threads(),
    )
    return dk, dv, last


def _bounds(bounds: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(bounds))(*bounds)


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        state: Tensor,
        bounds: list[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, decay, state)
        ctx.bounds, ctx.scale = bounds, scale
        return _run(q, k, v, decay, state, bounds, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, state = ctx.saved_tensors
        do, dfinal = (plain(x) for x in grads)
        scale, bounds = ctx.scale, ctx.bounds
        dq, _ = _run(do, v, k, decay, state.transpose(-1, -2).contiguous(), bounds, scale)
        # Backwards in time G_s = exp(-decay) G_{s+1} + scale q_s do_s^T, with exp(-decay) G_T =
        # dfinal. The kernel scales outputs, not states, so the seed is divided by scale, and so is
        # what is left at the start.
        grow = torch.exp(decay.clamp(max=80.0))[None, :, None, None]
        seed = (dfinal * grow / scale).flip(0).contiguous()
        dk, dv, last = _run_back(q, k, v, do, decay, seed, bounds, scale)
        return dq, dk, dv, None, last.flip(0) * scale / grow, None, None


def cpp_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments as `naive_lightning_attention`; computes in float32. No second derivatives."""
    batch, length, heads, dim = q.shape
    bounds = [n * length for n in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    shape = (len(bounds) - 1, heads, dim, v.shape[-1])
    state = torch.zeros(shape) if initial_state is None else initial_state.to(torch.float32).contiguous()
    flat = (x.to(torch.float32).reshape(batch * length, heads, -1).contiguous() for x in (q, k, v))
    o, final = _Lightning.apply(*flat, plain(decay), state, bounds, scale)
    return o.view(batch, length, heads, -1).to(v.dtype), final
