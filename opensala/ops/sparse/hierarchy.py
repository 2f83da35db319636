"""Hierarchical block selection in PyTorch: regions of 16 blocks first, compressed keys only inside promising
ones.

Exact selection scores every compressed key: tokens^2 / 16 products a head. Here a query is first held against
four numbers a dimension and region (mean, variance, maximum and minimum of its compressed keys), which is
tokens^2 / 256, and then against the keys of a fixed number of regions. `naive_select_regions` states the
rule, and `docs/selection.md` has its recall. It is a choice, never a fallback.

Shapes: T queries, H kv heads, G query heads a kv head, D head dim, R regions, w windows a region, N blocks.
"""

import math

import torch
from torch import Tensor

from .select import pick_blocks, take_all
from .spec import LIMIT, REGION, BlockSpec

_LARGEST = 3e38
TILE_ELEMENTS = 1 << 22


def _statistics(k1_nHD: Tensor, windows: int) -> tuple[Tensor, ...]:
    """Mean, variance, maximum and minimum over the windows of each full region, `[H, D, R]` each."""
    regions = k1_nHD.shape[0] // windows
    x = k1_nHD[: regions * windows].unflatten(0, (regions, windows))
    parts = (x.mean(1), x.var(1, unbiased=False), x.amax(1), x.amin(1))
    return tuple(y.permute(1, 2, 0) for y in parts)


def choose_regions(
    q_HGTD: Tensor, statistics: tuple[Tensor, ...], complete: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """Regions each query looks into, `[H, T, R]` bool, and the log-sum-exp of each head, `[H, G, T, 1]`.

    q is scaled; complete `[T]` counts the regions a query sees in full. Regions that are not complete are not
    marked.
    """
    mean, variance, high, low = (x[:, None] for x in statistics)
    hidden = torch.arange(mean.shape[-1], device=q_HGTD.device) >= complete[:, None]
    expected, spread = q_HGTD @ mean, (q_HGTD * q_HGTD) @ variance
    lse = (expected + spread / 2).masked_fill(hidden, -math.inf).logsumexp(-1, keepdim=True)
    lse = torch.where(complete[:, None] > 0, lse, 0.0)
    bound = q_HGTD.clamp(min=0) @ high + q_HGTD.clamp(max=0) @ low
    limit = LIMIT * math.log(2)
    promising = (expected + 2 * spread.sqrt() - lse).clamp(max=limit).exp().sum(1).masked_fill(hidden, -1.0)
    possible = (bound - lse).clamp(max=limit).exp().sum(1).masked_fill(hidden, -1.0)
    chosen = torch.zeros_like(promising, dtype=torch.bool)
    if chosen.shape[-1] <= budget:
        return ~hidden.expand_as(chosen), lse
    # sort, not topk: it is stable, so that the lower of two equal regions wins
    chosen.scatter_(
        -1, promising.sort(stable=True, dim=-1, descending=True).indices[..., : budget // 2], True
    )
    rest = possible.masked_fill(chosen, -1.0).sort(stable=True, dim=-1, descending=True).indices
    chosen.scatter_(-1, rest[..., : budget - budget // 2], True)
    few = (complete <= budget)[:, None]
    return torch.where(few, ~hidden, chosen & ~hidden), lse


def _tile(
    q_HGTD: Tensor,
    k1_nHD: Tensor,
    statistics: tuple[Tensor, ...],
    positions: Tensor,
    spec: BlockSpec,
    budget: int,
) -> Tensor:
    """Blocks of one tile of queries at consecutive positions: `[H, T, K]`."""
    heads, group, tokens, _ = q_HGTD.shape
    windows, device = REGION * spec.ratio, q_HGTD.device
    seen = (
        (positions - (spec.kernel_size - 1))
        .div(spec.kernel_stride, rounding_mode="floor")
        .add(1)
        .clamp(min=0)
    )
    complete = seen // windows
    blocks = int(positions[-1]) // spec.block_size + 1
    chosen, lse = choose_regions(q_HGTD, statistics, complete, budget)
    regions = -(-blocks // REGION)
    looked = (
        torch.arange(regions, device=device) >= complete[:, None]
    )  # what is not complete is always looked into
    looked = looked.expand(heads, -1, -1).clone()
    looked[..., : chosen.shape[-1]] |= chosen[..., :regions]
    scores = q_HGTD.new_full((heads, tokens, regions, REGION), -math.inf)
    padded = torch.nn.functional.pad(k1_nHD, (0, 0, 0, 0, 1, max(0, regions * windows - k1_nHD.shape[0])))
    for region in looked.any(0).any(0).nonzero()[:, 0].tolist():
        first = region * windows - 1  # the window before the region reaches into its first block
        keys = padded[first + 1 : first + 2 + windows].permute(1, 2, 0)[:, None]
        p = (
            (q_HGTD @ keys - lse).clamp(max=127 * math.log(2)).exp().sum(1).clamp(max=_LARGEST)
        )  # [H, T, w + 1]
        number = torch.arange(first, first + 1 + windows, device=device)
        p = p.masked_fill((number >= seen[:, None]) | (number < 0), -math.inf)
        pooled = p.unfold(-1, spec.ratio + 1, spec.ratio).amax(-1)
        scores[:, :, region] = pooled.masked_fill(~looked[..., region, None], -math.inf)
    return pick_blocks(scores.flatten(2)[..., :blocks].contiguous(), positions, spec)


def select_sequence_by_regions(
    q: Tensor, k1: Tensor, k2: Tensor, length: int, spec: BlockSpec, scale: float, budget: int
) -> Tensor:
    """One sequence: q `[T, Hq, D]` at the last T of `length` positions -> `[T, Hkv, num_blocks]` int32.

    k2 is not used: the regions give the softmax denominator too.
    """
    tokens, heads, dim = q.shape
    first = length - tokens
    result, cut = take_all(q, k1.shape[1], length, spec)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k1.to(compute)
    statistics = _statistics(keys, REGION * spec.ratio)
    tile = max(16, TILE_ELEMENTS // (heads * REGION * spec.ratio * 8))
    for a in range(cut, tokens, tile):
        b = min(a + tile, tokens)
        positions = torch.arange(first + a, first + b, device=q.device)
        queries = (q[a:b].to(compute) * scale).view(b - a, k1.shape[1], -1, dim).permute(1, 2, 0, 3)
        result[a:b] = _tile(queries, keys, statistics, positions, spec, budget).transpose(0, 1)
    return result
