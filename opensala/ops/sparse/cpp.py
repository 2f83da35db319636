"""Selection and block-sparse attention by the compiled CPU kernels (`ops/native`): float32 work, keys in any
float type.

Shapes: B rows, T queries, L keys, Hq/Hkv query/kv heads, D/E key/value dim, K selected blocks.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..native import library
from ..native.tensors import address, inner_contiguous, kind, plain, threads
from .spec import BlockSpec

TILE_ROWS = (
    4096  # (query, head) rows whose partial results one thread holds at once: 1 MB of float32 at E = 64
)
SELECT_ROWS = 1024  # (query, head) rows of a tile of the selection
REGION_ROWS = 256  # the same for hierarchical selection, which keeps three numbers a row and region
KEYS = 64  # that attention over all keys unpacks at a time
PART_BYTES = 1 << 30  # memory the separate sums of the backward pass may take


def _layout(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, size: int, scale: float
) -> tuple[int | float, ...]:
    tokens, heads, dim = q.shape
    length, kv_heads = k.shape[:2]
    return (
        tokens,
        length,
        heads,
        kv_heads,
        dim,
        v.shape[-1],
        0 if blocks is None else blocks.shape[-1],
        size,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        scale * math.log2(math.e),
        TILE_ROWS,
    )


def cpp_select_sequence(
    q: Tensor, k1: Tensor, k2: Tensor, length: int, spec: BlockSpec, scale: float, lse: str
) -> Tensor:
    """One sequence; same arguments as `select_sequence`: `[T, Hq, D]` -> `[T, Hkv, num_blocks]` int32."""
    wide, tokens = plain(q), q.shape[0]
    k1, k2 = inner_contiguous(k1.detach()), inner_contiguous(k2.detach()).to(k1.dtype)
    out = torch.empty(tokens, k1.shape[1], spec.num_blocks, dtype=torch.int32)
    library().call(
        "opensala_select",
        address(wide),
        address(k1),
        address(k2),
        kind(k1),
        address(out),
        tokens,
        length - tokens,
        q.shape[1],
        k1.shape[1],
        q.shape[2],
        k1.stride(0),
        k1.stride(1),
        k2.stride(0),
        k2.stride(1),
        spec.block_size,
        spec.kernel_stride,
        spec.kernel_size,
        spec.init_blocks,
        spec.window_blocks,
        spec.num_blocks,
        int(lse == "coarse"),
        scale * math.log2(math.e),
        SELECT_ROWS,
        threads(),
    )
    return out


def cpp_select_by_regions(
    q: Tensor, k1: Tensor, k2: Tensor, length: int, spec: BlockSpec, scale: float, budget: int
) -> Tensor:
    """One sequence; same arguments as `select_sequence_by_regions`: `[T, Hq, D]` -> `[T, Hkv, num_blocks]`
    int32."""
    wide, tokens, k1 = plain(q), q.shape[0], inner_contiguous(k1.detach())
    out = torch.empty(tokens, k1.shape[1], spec.num_blocks, dtype=torch.int32)
    library().call(
        "opensala_select_regions",
        address(wide),
        address(k1),
        kind(k1),
        address(out),
        tokens,
        length - tokens,
        q.shape[1],
        k1.shape[1],
        q.shape[2],
        k1.stride(0),
        k1.stride(1),
        spec.block_size,
        spec.kernel_stride,
        spec.kernel_size,
        spec.init_blocks,
        spec.window_blocks,
        spec.num_blocks,
        scale * math.log2(math.e),
        budget,
        REGION_ROWS,
        threads(),
    )
    return out


class _SparseAttention(torch.autograd.Function):
    """One sequence: q `[T, Hq, D]`, k `[L, Hkv, D]`, v `[L, Hkv, E]`, blocks `[T, Hkv, K]` int32, or None for
    all that a query may see -> `[T, Hq, E]`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, size: int, scale: float
    ) -> Tensor:
        wide, keys, values = plain(q), inner_contiguous(k.detach()), inner_contiguous(v.detach())
        values = values.to(keys.dtype)
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=torch.float32)
        lse = torch.empty(q.shape[:2], dtype=torch.float32) if any(ctx.needs_input_grad) else None
        library().call(
            "opensala_attend_forward",
            address(wide),
            address(keys),
            address(values),
            kind(keys),
            address(blocks),
            address(out),
            address(lse),
            *_layout(wide, keys, values, blocks, size, scale),
            threads(),
        )
        if lse is not None:
            ctx.save_for_backward(wide, keys, values, blocks, out, lse)
            ctx.size, ctx.scale, ctx.dtypes = size, scale, (q.dtype, k.dtype, v.dtype)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, blocks, out, lse = ctx.saved_tensors
        grad = plain(grads[0])
        delta = (grad * out).sum(-1).contiguous()
        dq = torch.empty_like(q)
        one = 4 * k.shape[0] * k.shape[1] * (k.shape[2] + v.shape[2])
        parts = max(1, min(-(-threads() // k.shape[1]), PART_BYTES // one))
        dk = torch.zeros(parts, k.shape[1], k.shape[0], k.shape[2])
        dv = torch.zeros(parts, v.shape[1], v.shape[0], v.shape[2])
        library().call(
            "opensala_attend_backward",
            address(q),
            address(k),
            address(v),
            kind(k),
            address(blocks),
            address(grad),
            address(lse),
            address(delta),
            address(dq),
            address(dk),
            address(dv),
            *_layout(q, k, v, blocks, ctx.size, ctx.scale),
            parts,
            threads(),
        )
        dtypes = ctx.dtypes
        return (
            dq.to(dtypes[0]),
            dk.sum(0).transpose(0, 1).to(dtypes[1]),
            dv.sum(0).transpose(0, 1).to(dtypes[2]),
            None,
            None,
            None,
        )


def cpp_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float
) -> Tensor:
    """One sequence; same arguments as `attend_sequence`. No second derivatives."""
    return _SparseAttention.apply(q, k, v, blocks.to(torch.int32).contiguous(), block_size, scale)


def cpp_dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence: q `[T, Hq, D]`, the last T of L positions, k `[L, Hkv, D]`, v `[L, Hkv, E]` -> `[T, Hq,
    E]`. No second derivatives."""
    return _SparseAttention.apply(q, k, v, None, KEYS, scale)
