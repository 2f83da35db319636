"""Losses: next-token loss weighted or in chunks, and one that teaches compressed keys to find what attention
finds."""

from typing import Any

import torch
from torch import Tensor

from ..model.attention import SparseMixer
from ..model.layout import rows_layout
from ..ops import compress_keys

IGNORED = -100
LOSS_ROWS = 1024  # tokens whose logits exist at a time


def weighted_next_token_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of predicting ids[:, t + 1] at t, each target weighted.

    Args:
        logits: `[B, T, V]`; ids: `[B, T]`; weights: `[B, T]`, the weight of each token as a target.
    """
    targets, w = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, reduction="none"
    )
    return (losses * w).sum() / w.sum()


def selection_alignment_loss(mixer: SparseMixer, x: Tensor, queries: Tensor, documents: Tensor) -> Tensor:
    """Make the compressed keys of a sparse layer rank first the windows its attention looks at.

    Block selection has no parameters and passes no gradient, so nothing in the ordinary loss keeps a key
    findable once it is averaged with its neighbours. Here the layer's own dense attention over the document
    is the teacher, and the softmax over compressed keys the student. Windows of all other documents of the
    batch are added as negatives: positions carry no information in these layers (HyPE), so they stand for
    the rest of a much longer document.

    Args:
        mixer: the sparse layer. Only its q and k projections receive gradient (and x).
        x: `[B, T, hidden]` its normalised input.
        queries: `[N, 2]` (row, position) of the queries to align.
        documents: `[B]` length of the document at the head of each row; only windows inside count.

    Returns:
        Mean cross-entropy over queries and heads, weighted by the attention mass inside the document.
    """
    batch, length, _ = x.shape
    q, k, _ = mixer.project(x, rows_layout((batch, length), None, [False] * batch, x.device))
    kv_heads, spec = k.shape[2], mixer.config.block_spec
    row, place = queries.unbind(1)
    q = q[row, place].unflatten(1, (kv_heads, -1)) * mixer.scale  # [N, Hkv, G, D]
    k1 = compress_keys(k, spec.kernel_size, spec.kernel_stride)  # [B, n, Hkv, D]
    windows = k1.shape[1]
    starts = torch.arange(windows, device=x.device) * spec.kernel_stride
    inside = starts[None] + spec.kernel_size <= documents[:, None]  # [B, n]

    with torch.no_grad():
        dense = torch.einsum("nhgd,nthd->nhgt", q, k[row])
        causal = torch.arange(length, device=x.device)[None] <= place[:, None]
        attention = dense.masked_fill(~causal[:, None, None], -torch.inf).softmax(-1)
        pooled = (
            attention.unfold(-1, spec.kernel_size, spec.kernel_stride).sum(-1) * inside[row][:, None, None]
        )
        mass = pooled.sum(-1)
        target = pooled / mass.clamp(min=1e-6)[..., None]  # [N, Hkv, G, n]

    scores = torch.einsum("nhgd,bwhd->nhgbw", q, k1).masked_fill(~inside, -torch.inf)
    log_p = scores.flatten(-2).log_softmax(-1).unflatten(-1, (batch, windows))
    own = log_p[torch.arange(len(row), device=x.device), :, :, row]  # [N, Hkv, G, n]
    cross_entropy = -(target * own.masked_fill(target == 0, 0.0)).sum(-1)
    return (cross_entropy * mass).sum() / mass.sum().clamp(min=1e-6)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies over rows; gradients are made chunk by chunk in the forward pass, so logits
    exist once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        wanted = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if wanted[0] else None
        d_weight = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device) if wanted[1] else None
        for a in range(0, hidden.shape[0], rows):
            part, wanted_ids = hidden[a : a + rows], targets[a : a + rows]
            kept = wanted_ids != IGNORED
            ids = wanted_ids.clamp(min=0)[:, None]
            logits = (part @ weight.T).to(total.dtype)
            lse = torch.logsumexp(logits, 1, keepdim=True)
            total += ((lse - logits.gather(1, ids))[:, 0] * kept).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = (logits - lse).exp_()
            d_logits.scatter_add_(1, ids, torch.full_like(lse, -1.0))
            d_logits = (d_logits * kept[:, None]).to(weight.dtype)
            if d_hidden is not None:
                d_hidden[a : a + rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += (d_logits.T @ part).to(d_weight.dtype)
        ctx.save_for_backward(*(x for x in (d_hidden, d_weight) if x is not None))
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_hidden = saved.pop(0) * grads[0] if ctx.needs_input_grad[0] else None
        d_weight = (saved.pop(0) * grads[0]).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return None if d_hidden is None else d_hidden.to(ctx.dtype), d_weight, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = LOSS_ROWS) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight')[target], logits of `rows` tokens at a time.

    Args:
        hidden: `[N, D]` what the head multiplies; weight: `[V, D]`; targets: `[N]`, -100 where there is none.
        rows: tokens whose logits exist at a time.

    Returns:
        The sum as a float32 scalar (float64 for float64); gradients flow to hidden and weight. Divide by the
        number of targets of the whole optimizer step, over all its passes and ranks, for the mean.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden must be [N, D], weight [V, D], targets [N], got {list(hidden.shape)}, "
            f"{list(weight.shape)}, {list(targets.shape)}"
        )
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, rows)
