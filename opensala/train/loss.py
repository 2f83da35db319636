"""Losses. So far: weighted next-token loss, and a loss that teaches compressed keys to find what attention finds."""

import torch
from torch import Tensor

from ..model.attention import SparseMixer
from ..model.layout import rows_layout
from ..ops import compress_keys


def weighted_next_token_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of predicting ids[:, t + 1] at t, each target weighted.

    Args:
        logits: `[B, T, V]`; ids: `[B, T]`; weights: `[B, T]`, the weight of each token as a target.
    """
    targets, w = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none")
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
    q, k, _ = mixer.project(x, rows_layout((batch, length), None, [0] * batch, [False] * batch, x.device))
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
        pooled = attention.unfold(-1, spec.kernel_size, spec.kernel_stride).sum(-1) * inside[row][:, None, None]
        mass = pooled.sum(-1)
        target = pooled / mass.clamp(min=1e-6)[..., None]  # [N, Hkv, G, n]

    scores = torch.einsum("nhgd,bwhd->nhgbw", q, k1).masked_fill(~inside, -torch.inf)
    log_p = scores.flatten(-2).log_softmax(-1).unflatten(-1, (batch, windows))
    own = log_p[torch.arange(len(row), device=x.device), :, :, row]  # [N, Hkv, G, n]
    cross_entropy = -(target * own.masked_fill(target == 0, 0.0)).sum(-1)
    return (cross_entropy * mass).sum() / mass.sum().clamp(min=1e-6)
