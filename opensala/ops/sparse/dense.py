"""Causal softmax attention over all keys, of whole sequences: what a layer does that selects no blocks."""

import torch
from torch import Tensor, nn

from ..backends import Backend, choose_backend
from .cpp import cpp_dense_attention

_TILE = 1 << 24  # mask elements of one tile of attention over earlier tokens


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, backend: Backend | None = None
) -> Tensor:
    """Causal softmax attention of the last T of L positions.

    Args:
        q (Tensor): queries `[B, T, Hq, D]`.
        k, v (Tensor): `[B, L, Hkv, D]` and `[B, L, Hkv, Dv]`.
        scale: factor on the scores.
        backend: `cpp` computes in float32 whatever comes in; all others leave it to PyTorch.

    Returns:
        `[B, T, Hq, Dv]` in q's dtype. Gradients flow to q, k and v.

    Raises:
        ValueError: an unavailable backend.
    """
    if choose_backend("dense_attention", q, backend, {"cpp": None}) == "cpp":
        return torch.stack([cpp_dense_attention(*row, scale) for row in zip(q, k, v, strict=True)])
    return _scaled_dot_product(q, k, v, scale)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    tokens, length = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = nn.functional.scaled_dot_product_attention
    if tokens == length:
        return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    tile = max(64, _TILE // length)
    column = torch.arange(length, device=q.device)
    parts = []
    for a in range(0, tokens, tile):
        b = min(a + tile, tokens)
        end = length - tokens + b
        mask = column[:end] <= column[length - tokens + a : end, None]
        keys, values = k[:, :, :end], v[:, :, :end]
        parts.append(attend(q[:, :, a:b], keys, values, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)
