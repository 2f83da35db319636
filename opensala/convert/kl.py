"""The loss of distillation: KL(teacher || student) of next-token distributions, and cross-entropy on answers.

Logits exist for a piece of the tokens at a time. Their gradient is made in the same pass, so that they are
computed once; what is kept for the backward pass is as large as the hidden states.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits of one piece


class TokenWeights(NamedTuple):
    """What each token counts, `[N]` float32: `kl` for the divergence there, `ce` for the cross-entropy of
    `targets` `[N]` int64, the tokens that follow. The loss is the sum of both; nothing is divided."""

    kl: Tensor
    ce: Tensor | None = None
    targets: Tensor | None = None


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
        for a in range(0, s.shape[0], rows):
            piece = slice(a, a + rows)
            lt = None if t is None or teacher_head is None else _log_softmax(t[piece], teacher_head)
            part, d = _piece(_log_softmax(s[piece], head), lt, _rows_of(weights, piece), wants_s or wants_w)
            total += part
            if d is None:
                continue
            d = d.to(head.dtype)
            if ds is not None:
                ds[piece] = d @ head
            if dw is not None:
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


def _rows_of(weights: TokenWeights, piece: slice) -> TokenWeights:
    return TokenWeights(*(None if x is None else x[piece] for x in weights))  # type: ignore[arg-type]


def _log_softmax(x: Tensor, head: Tensor) -> Tensor:
    """log softmax(x head') `[n, V]`, float32."""
    if x.is_cuda and x.dtype != torch.float32:
        logits = torch.mm(x, head.T, out_dtype=torch.float32)
    else:
        logits = (x @ head.T).float()
    return logits.sub_(torch.logsumexp(logits, 1, keepdim=True))


def _piece(
    ls: Tensor, lt: Tensor | None, weights: TokenWeights, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of some tokens, and its gradient by their logits; `ls` is overwritten."""
    total = ls.new_zeros(())
    pt = share = None
    if lt is not None:
        pt, share = lt.exp(), weights.kl
        total = total + ((pt * lt.sub_(ls)).sum(1) * share).sum()
    if weights.ce is not None and weights.targets is not None:
        total = total - (ls.gather(1, weights.targets[:, None])[:, 0] * weights.ce).sum()
        share = weights.ce if share is None else share + weights.ce
    if not gradient or share is None:
        return total, None
    d = ls.exp_().mul_(share[:, None])
    if pt is not None:
        d.sub_(pt.mul_(weights.kl[:, None]))
    if weights.ce is not None and weights.targets is not None:
        d.scatter_add_(1, weights.targets[:, None], -weights.ce[:, None])
    return total, d


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
