"""The Triton forms of compression, selection and block-sparse attention, as `opensala.ops.sparse` calls them.

Nothing here waits for the GPU: lengths and document boundaries stay where they are, and every shape follows
    from shapes.

Attention goes block by block where many queries share a block (`shared_enough`), else query by query. The
choice is made by counting bytes and has not been measured on a GPU yet.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..triton_common import computable
from .triton_attend import attend_by_query
from .triton_backward import attention_gradients
from .triton_compress import triton_extend_compressed
from .triton_pairs import attend_by_block, shared_enough
from .triton_rows import Rows, inner_contiguous, positive_factor, rows_of
from .triton_select import triton_select_blocks

__all__ = ["triton_extend_compressed", "triton_select_blocks", "triton_sparse_attention"]


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows, scale: float
    ) -> Tensor:
        ctx.size, ctx.rows, ctx.scale, ctx.dtypes = size, rows, scale, (q.dtype, k.dtype, v.dtype)
        common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = (inner_contiguous(computable(x.to(common))) for x in (q, k, v))
        attend = attend_by_block if shared_enough(q, v, blocks, size, rows) else attend_by_query
        queries, factor = positive_factor(q, scale)
        out, lse = attend(queries, k, v, blocks, size, rows, factor)
        ctx.save_for_backward(q, k, v, blocks, out, lse)
        return out.to(ctx.dtypes[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, blocks, out, lse = ctx.saved_tensors
        grads = attention_gradients(
            grad.to(q.dtype), q, k, v, blocks, out, lse, ctx.size, ctx.rows, ctx.scale
        )
        return *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None, None, None


def triton_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, lengths: Tensor | int | None,
    scale: float, cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `sparse_attention`."""
    rows = rows_of(q, k.shape[1], lengths, cu_seqlens)
    return _SparseAttention.apply(q, k, v, blocks.contiguous(), block_size, rows, scale)
