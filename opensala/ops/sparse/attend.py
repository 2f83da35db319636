"""Block-sparse causal attention in PyTorch, block-major: linear memory, forward and backward.

For a tile of queries, the (query, block) pairs are sorted by block and packed into groups of at most
GROUP pairs that share one key block, so that the work becomes one batched matrix product over groups;
the partial softmaxes of a query are then merged by their maxima and sums. Copying the selected keys for
each query (token-major) moves head-group times more memory and is used only for a few queries (decode).

Shapes: T queries, K selected blocks, G query heads a kv head, D/E key/value dim, S block size,
P pairs, M groups.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

GROUP = 32  # pairs of one group; times G rows a matrix product
TILE_PAIRS = 1 << 16  # (query, block) pairs handled at once
_FEW_QUERIES = 8


def attend_sequence(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float) -> Tensor:
    """One sequence: q `[T, Hq, D]` (the last T positions), k `[L, Hkv, D]`, v `[L, Hkv, E]`,
    blocks `[T, Hkv, K]` -> `[T, Hq, E]` in q's dtype, computed in float32 (float64 for float64)."""
    tokens, heads, dim = q.shape
    length, kv_heads = k.shape[:2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.view(tokens, kv_heads, heads // kv_heads, dim)
    tile = max(64, TILE_PAIRS // max(1, blocks.shape[-1]))
    few = tokens <= _FEW_QUERIES
    outputs = []
    for h in range(kv_heads):
        keys, values = k[:, h], v[:, h]
        parts = []
        for a in range(0, tokens, tile):
            args = (
                queries[a : a + tile, h].to(compute) * scale,
                keys,
                values,
                blocks[a : a + tile, h].long(),
                block_size,
                length - tokens + a,
            )
            if few:
                parts.append(_token_major(*args))
            elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                parts.append(checkpoint(_block_major, *args, use_reentrant=False))
            else:
                parts.append(_block_major(*args))
        outputs.append(torch.cat(parts))
    return torch.stack(outputs, 1).reshape(tokens, heads, -1).to(q.dtype)


def _token_major(q_TGD: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, first: int) -> Tensor:
    tokens = q_TGD.shape[0]
    positions = (blocks[..., None] * size + torch.arange(size, device=k.device)).view(tokens, -1)
    own = torch.arange(first, first + tokens, device=k.device)[:, None]
    hidden = (positions > own) | (positions < 0)
    positions = positions.masked_fill(hidden, 0)
    keys, values = k[positions].to(q_TGD.dtype), v[positions].to(q_TGD.dtype)
    scores = (q_TGD @ keys.transpose(-1, -2)).masked_fill(hidden[:, None], -math.inf)
    return scores.softmax(-1) @ values


def _block_major(q_TGD: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, first: int) -> Tensor:
    tokens, group, dim = q_TGD.shape
    chosen, device = blocks.shape[1], k.device
    total = -(-k.shape[0] // size)

    flat = blocks.reshape(-1)
    order = torch.argsort(torch.where(flat < 0, total, flat), stable=True)
    order = order[: int((flat >= 0).sum())]  # pairs, by block
    block_of = flat[order]
    counts = torch.bincount(block_of, minlength=total)
    groups_of = -(-counts // GROUP)
    group_start = groups_of.cumsum(0) - groups_of
    rank = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[block_of]
    slot = group_start[block_of] * GROUP + rank  # [P] place of each pair among the padded groups
    group_block = torch.repeat_interleave(torch.arange(total, device=device), groups_of)
    num_groups = len(group_block)

    query_of = torch.zeros(num_groups * GROUP, dtype=torch.long, device=device)
    query_of[slot] = order // chosen
    q_MRD = q_TGD[query_of].view(num_groups, GROUP * group, dim)
    scores = q_MRD @ _blocks_of(k, group_block, size, total).to(q_TGD.dtype).transpose(-1, -2)
    own = (first + query_of).view(num_groups, GROUP)
    edge = (own.amin(1) // size <= group_block).nonzero()[:, 0]  # groups in which causality can bite
    if len(edge):
        key = group_block[edge, None] * size + torch.arange(size, device=device)
        hidden = key[:, None, :] > own[edge][:, :, None]
        shaped = scores[edge].view(len(edge), GROUP, group, size).masked_fill(hidden[:, :, None], -math.inf)
        scores = scores.index_copy(0, edge, shaped.view(len(edge), GROUP * group, size))
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - peak).exp()
    part = weights @ _blocks_of(v, group_block, size, total).to(q_TGD.dtype)
    mass = weights.sum(-1)

    place = torch.full((tokens * chosen,), num_groups * GROUP, dtype=torch.long, device=device)
    place[order] = slot
    none = num_groups * GROUP  # an absent pair reads this extra row: peak -inf, mass and output 0

    def gather(x: Tensor, fill: float) -> Tensor:  # [M, GROUP * G, ...] -> [T, K, G, ...]
        rows = x.reshape(none, group, *x.shape[2:])
        rows = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), fill)])
        return rows[place].view(tokens, chosen, *rows.shape[1:])

    peaks = gather(peak[..., 0], -math.inf)
    factor = (peaks - peaks.amax(1, keepdim=True)).exp()
    out = (gather(part, 0.0) * factor[..., None]).sum(1)
    return out / (gather(mass, 0.0) * factor).sum(1)[..., None]


def _blocks_of(x: Tensor, group_block: Tensor, size: int, total: int) -> Tensor:
    """Rows of x `[L, D]` in blocks, one block for each group: `[M, S, D]`; a short last block is
    zero-padded."""
    full = x.shape[0] // size
    if full == total:
        return x.unflatten(0, (total, size))[group_block]
    rest = torch.nn.functional.pad(x[full * size :], (0, 0, 0, total * size - x.shape[0]))
    if full == 0:
        return rest.expand(len(group_block), -1, -1)
    # Groups are in order of blocks: those of the short block come last. Padding all of x would copy it
    # each time.
    last = int((group_block == full).sum())
    whole = x[: full * size].unflatten(0, (full, size))[group_block[: len(group_block) - last]]
    return torch.cat([whole, rest.expand(last, -1, -1)])
