"""The loss of distillation: KL(teacher || student) of next-token distributions, and cross-entropy on answers.

Logits exist for a piece of the tokens at a time. Their gradient is made in the same pass, so that they are
computed once; what is kept for the backward pass is as large as the hidden states.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import TokenWeights, divergence

__all__ = ["TokenWeights", "chunked_kl", "distillation_loss"]
_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits of one piece


class _Distillation(torch.autograd.Function):
    """Sums over tokens of the weighted divergences and cross-entropies, with gradients for s and Ws."""

    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        ws: Tensor,
        t: Tensor | None,
        wt: Tensor | None,
        weights: TokenWeights,
        rows: int,
    ) -> Tensor:
        wants_s, wants_w = ctx.needs_input_grad[:2]
        head, teacher_head = ws.to(s.dtype), None if t is None or wt is None else wt.to(t.dtype)
        total = torch.zeros((), dtype=torch.float32, device=s.device)
        ds = torch.empty(s.shape, dtype=torch.float32, device=s.device) if wants_s else None
        dw = torch.zeros(ws.shape, dtype=torch.float32, device=s.device) if wants_w else None
        mine, theirs = _Logits(head, rows), None if teacher_head is None else _Logits(teacher_head, rows)
        for a in range(0, s.shape[0], rows):
            piece = slice(a, a + rows)
            losses, d = divergence(
                mine.of(s[piece]),
                None if t is None or theirs is None else theirs.of(t[piece]),
                TokenWeights(*(None if x is None else x[piece] for x in weights)),  # type: ignore[arg-type]
                gradient=head.dtype if wants_s or wants_w else None,
            )
            total += losses.sum()
            if ds is not None and d is not None:
                ds[piece] = d @ head
            if dw is not None and d is not None:
                dw += d.T @ s[piece]
        ctx.save_for_backward(*(x for x in (ds, dw) if x is not None))
        ctx.dtypes = s.dtype, ws.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        ds = (saved.pop(0) * grads[0]).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        dw = (saved.pop(0) * grads[0]).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return ds, dw, None, None, None, None


class _Logits:
    """Logits of a piece of the tokens, always in the same memory: new memory for every piece would cost a CPU
    more time than the product that fills it."""

    def __init__(self, head: Tensor, rows: int) -> None:
        self.head = head
        self.wide = head.is_cuda and head.itemsize == 2  # there a product can come out as it was summed up
        self.room = head.new_empty(0 if self.wide else rows, head.shape[0])

    def of(self, x: Tensor) -> Tensor:
        """`[n, V]` for x `[n, D]`: float32 on a GPU, in the products' dtype on a CPU."""
        if self.wide:
            return torch.mm(x, self.head.T, out_dtype=torch.float32)
        return torch.mm(x, self.head.T, out=self.room[: len(x)])


def distillation_loss(
    s: Tensor, ws: Tensor, t: Tensor | None, wt: Tensor | None, weights: TokenWeights, rows: int | None = None
) -> Tensor:
    """Sum over tokens of weights.kl * KL(softmax(t Wt') || softmax(s Ws')) + weights.ce * cross-entropy.

    Args:
        s, t: final hidden states of student and teacher, `[N, D]` each with its own D; products are taken in
            their dtypes, everything behind them in float32. Without t there is only cross-entropy.
        ws, wt: their heads, `[V, D]`.
        rows: tokens whose logits exist at a time; what fits 64 MB on a CPU and 512 MB on a GPU if None.

    Returns:
        A float32 scalar. Gradients flow to s and ws, once.

    Raises:
        ValueError: heads with different vocabularies.
    """
    if wt is not None and ws.shape[0] != wt.shape[0]:
        raise ValueError(
            f"student and teacher must share a vocabulary, got {ws.shape[0]} and {wt.shape[0]} entries"
        )
    rows = rows or max(16, _ELEMENTS.get(s.device.type, 1 << 24) // ws.shape[0])
    t, wt = (None if x is None else x.detach() for x in (t, wt))
    if t is not None and s.dtype == torch.float32:
        t = t.float()
    return _Distillation.apply(s, ws, t, wt, weights, rows)


def chunked_kl(s: Tensor, ws: Tensor, t: Tensor, wt: Tensor, rows: int | None = None) -> Tensor:
    """Mean of KL(softmax(t Wt') || softmax(s Ws')) over tokens; see `distillation_loss`."""
    weights = TokenWeights(torch.full((s.shape[0],), 1.0 / s.shape[0], device=s.device))
    return distillation_loss(s, ws, t, wt, weights, rows)
