"""The plain statement of InfLLM-V2: one query after the other, straight from the definition.

Ground truth for every fast path (call it in float64). One sequence at a time, no batch, no tiles:
q `[T, Hq, D]` are the last T of L positions, k and v are `[L, Hkv, D]`.
"""

import math

import torch
from torch import Tensor

from .spec import BlockSpec


def naive_compress_keys(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Mean of every full window of keys: `[L, Hkv, D]` -> `[n, Hkv, D]`."""
    starts = range(0, k.shape[0] - kernel_size + 1, kernel_stride)
    means = [k[a : a + kernel_size].mean(0) for a in starts]
    return torch.stack(means) if means else k.new_zeros(0, *k.shape[1:])


def naive_block_scores(q: Tensor, k1: Tensor, k2: Tensor, spec: BlockSpec, position: int, scale: float,
                       lse: str) -> Tensor:
    """Scores of all blocks up to the query's own, `[Hkv, blocks]`, for one query `[Hq, D]`."""
    kv_heads = k1.shape[1]
    group = q.shape[0] // kv_heads
    own = position // spec.block_size
    blocks = own + 1
    scores = torch.full((kv_heads, blocks), -math.inf, dtype=q.dtype)
    seen1 = [j for j in range(len(k1)) if position >= j * spec.kernel_stride + spec.kernel_size - 1]
    seen2 = [j for j in range(len(k2)) if position >= j * spec.coarse_stride + spec.coarse_size - 1]
    for h in range(kv_heads):
        p = torch.zeros(len(seen1), dtype=q.dtype)
        for g in range(group):
            query = q[h * group + g]
            logits = k1[: len(seen1), h] @ query * scale
            reference = k2[: len(seen2), h] @ query * scale if seen2 and lse == "coarse" else logits
            p += torch.exp(logits - torch.logsumexp(reference, 0))
        for b in range(blocks):
            near = [p[j] for j in range(spec.ratio * b - 1, spec.ratio * (b + 1)) if 0 <= j < len(seen1)]
            if near:
                scores[h, b] = torch.stack(near).max()
            if b < spec.init_blocks or own - b <= spec.window_blocks:
                scores[h, b] = math.inf
    return scores


def naive_select_blocks(q: Tensor, k: Tensor, spec: BlockSpec, scale: float, lse: str = "coarse") -> Tensor:
    """Selected blocks of each query, ascending, padded with -1: `[T, Hkv, num_blocks]`."""
    k1 = naive_compress_keys(k, spec.kernel_size, spec.kernel_stride)
    k2 = naive_compress_keys(k, spec.coarse_size, spec.coarse_stride)
    offset = k.shape[0] - q.shape[0]
    result = torch.full((q.shape[0], k.shape[1], spec.num_blocks), -1)
    for t in range(q.shape[0]):
        scores = naive_block_scores(q[t], k1, k2, spec, offset + t, scale, lse)
        keep = min(spec.num_blocks, scores.shape[1])
        result[t, :, :keep] = scores.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
    return result


def naive_sparse_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int,
                           scale: float) -> Tensor:
    """Causal softmax attention over the keys of the listed blocks: `[T, Hq, Dv]`."""
    length, kv_heads = k.shape[:2]
    group, offset = q.shape[1] // kv_heads, length - q.shape[0]
    rows = []
    for t in range(q.shape[0]):
        heads = []
        for h in range(kv_heads):
            keys = [
                j for b in blocks[t, h].tolist() if b >= 0
                for j in range(b * block_size, min((b + 1) * block_size, offset + t + 1))
            ]
            for g in range(group):
                weights = torch.softmax(k[keys, h] @ q[t, h * group + g] * scale, 0)
                heads.append(weights @ v[keys, h])
        rows.append(torch.stack(heads))
    return torch.stack(rows)
