"""The reference implementation of InfLLM-V2: one query after the other, straight from the definition.

Ground truth for every fast path (call it in float64). One sequence at a time, no batch, no tiles:
q `[T, Hq, D]` are the last T of L positions, k and v are `[L, Hkv, D]`.
"""

import math

import torch
from torch import Tensor

from .spec import LIMIT, REGION, BlockSpec


def naive_compress_keys(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Mean of every full window of keys: `[L, Hkv, D]` -> `[n, Hkv, D]`."""
    starts = range(0, k.shape[0] - kernel_size + 1, kernel_stride)
    means = [k[a : a + kernel_size].mean(0) for a in starts]
    return torch.stack(means) if means else k.new_zeros(0, *k.shape[1:])


def naive_block_scores(
    q: Tensor, k1: Tensor, k2: Tensor, spec: BlockSpec, position: int, scale: float, lse: str
) -> Tensor:
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


def naive_select_regions(q: Tensor, k: Tensor, spec: BlockSpec, scale: float, budget: int) -> Tensor:
    """Hierarchical selection: blocks outside of the regions looked into are not scored: `[T, Hkv,
    num_blocks]`.

    A region is 16 blocks. Of each region the query sees in full, over its compressed keys x: e = mean of q.x,
    s^2 = sum of q_d^2 var(x_d), u = sum of max(q_d max(x_d), q_d min(x_d)). LSE = log-sum-exp of e + s^2 / 2.
    The query looks into the regions it sees in part, the budget / 2 with the largest sum over heads of exp(e
    + 2 s - LSE), and of the others those with the largest sum of exp(u - LSE). Inside, blocks are scored as
    in exact selection.
    """
    k1 = naive_compress_keys(k, spec.kernel_size, spec.kernel_stride)
    group, offset, windows = q.shape[1] // k.shape[1], k.shape[0] - q.shape[0], REGION * spec.ratio
    result = torch.full((q.shape[0], k.shape[1], spec.num_blocks), -1)
    for t in range(q.shape[0]):
        position = offset + t
        own, seen = (
            position // spec.block_size,
            max(0, (position + 1 - spec.kernel_size) // spec.kernel_stride + 1),
        )
        complete = seen // windows
        for h in range(k.shape[1]):
            queries = q[t, h * group : (h + 1) * group] * scale
            promising, possible, lses = (
                torch.zeros(complete, dtype=q.dtype),
                torch.zeros(complete, dtype=q.dtype),
                [],
            )
            for query in queries:
                e, s, u = torch.zeros(3, complete, dtype=q.dtype)
                for r in range(complete):
                    x = k1[r * windows : (r + 1) * windows, h]
                    e[r] = (x @ query).mean()
                    s[r] = (query**2 * x.var(0, unbiased=False)).sum().sqrt()
                    u[r] = torch.maximum(query * x.amax(0), query * x.amin(0)).sum()
                lses.append(torch.logsumexp(e + s * s / 2, 0) if complete else e.new_zeros(()))
                promising += torch.exp((e + 2 * s - lses[-1]).clamp(max=LIMIT * math.log(2)))
                possible += torch.exp((u - lses[-1]).clamp(max=LIMIT * math.log(2)))
            best = sorted(range(complete), key=lambda r: -promising[r])[: budget // 2]
            rest = sorted(set(range(complete)) - set(best), key=lambda r: -possible[r])
            looked = set(best + rest[: budget - budget // 2]) | set(range(complete, own // REGION + 1))
            scores = torch.full((own + 1,), -math.inf, dtype=q.dtype)
            for b in range(own + 1):
                near = [j for j in range(spec.ratio * b - 1, spec.ratio * (b + 1)) if 0 <= j < seen]
                if near and b // REGION in looked:
                    scores[b] = max(
                        sum(torch.exp(k1[j, h] @ x - lse) for x, lse in zip(queries, lses, strict=True))
                        for j in near
                    )
                if b < spec.init_blocks or own - b <= spec.window_blocks:
                    scores[b] = math.inf
            keep = min(spec.num_blocks, own + 1)
            result[t, h, :keep] = scores.topk(keep, sorted=False).indices.sort().values
    return result


def naive_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float
) -> Tensor:
    """Causal softmax attention over the keys of the listed blocks: `[T, Hq, Dv]`."""
    length, kv_heads = k.shape[:2]
    group, offset = q.shape[1] // kv_heads, length - q.shape[0]
    rows = []
    for t in range(q.shape[0]):
        heads = []
        for h in range(kv_heads):
            keys = [
                j
                for b in blocks[t, h].tolist()
                if b >= 0
                for j in range(b * block_size, min((b + 1) * block_size, offset + t + 1))
            ]
            for g in range(group):
                weights = torch.softmax(k[keys, h] @ q[t, h * group + g] * scale, 0)
                heads.append(weights @ v[keys, h])
        rows.append(torch.stack(heads))
    return torch.stack(rows)
