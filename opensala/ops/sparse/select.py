"""Block selection in tiles of queries: scores are pooled and reduced to the top k as they are made.

For a tile of queries the scores against the visible compressed keys are computed, turned into
probabilities, summed over the query heads of a kv head and max-pooled to blocks; only block numbers
leave the tile, so memory is linear in length. Compressed keys are laid out phase-major (all windows that
start a block first, then the next ones), so that pooling compares whole contiguous rows.

Shapes: T queries, Hq/Hkv query/kv heads, G = Hq / Hkv, D head dim, n windows, N blocks, r windows a block.
"""

import math

import torch
from torch import Tensor

from .spec import BlockSpec, num_windows
from .ties import LARGEST

TILE_ELEMENTS = 1 << 22  # scores alive at once (16 MB in float32), but at least those of 16 queries
SPAN = 4096  # queries that share one layout of the compressed keys


def compress(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Mean of every full window: `[B, L, Hkv, D]` -> `[B, n, Hkv, D]`, in k's dtype, summed in float32."""
    n = num_windows(k.shape[1], kernel_size, kernel_stride)
    if n == 0:
        return k.new_zeros(k.shape[0], 0, *k.shape[2:])
    windows = k[:, : (n - 1) * kernel_stride + kernel_size].unfold(1, kernel_size, kernel_stride)
    return windows.mean(-1, dtype=torch.float64 if k.dtype == torch.float64 else torch.float32).to(k.dtype)


def _phase_major(k1: Tensor, ratio: int) -> Tensor:
    """`[n, Hkv, D]` -> `[Hkv, D, r * N]`, window j at column (j % r) * N + j // r; empty slots are zero."""
    n, heads, dim = k1.shape
    blocks = -(-n // ratio)
    padded = torch.nn.functional.pad(k1, (0, 0, 0, 0, 0, blocks * ratio - n))
    return padded.view(blocks, ratio, heads, dim).permute(2, 3, 1, 0).reshape(heads, dim, -1).contiguous()


def _masked_lse(scores: Tensor, visible: Tensor) -> Tensor:
    """logsumexp over the first visible[t] columns of scores `[..., T, n]` -> `[..., T, 1]`; modifies
    scores."""
    hidden = torch.arange(scores.shape[-1], device=scores.device) >= visible[:, None]
    return scores.masked_fill_(hidden, -math.inf).logsumexp(-1, keepdim=True)


def _top(scores: Tensor, positions: Tensor, spec: BlockSpec) -> Tensor:
    """Best blocks of each query: scores `[Hkv, T, N]` -> `[Hkv, T, num_blocks]`, ascending.

    Neighbouring blocks share a window and often tie exactly. The reference lets torch.topk decide over the
    blocks a query can see, so queries of one block are reduced together over exactly those: the choice then
    does not depend on how the queries were cut into tiles.
    """
    first, last = (int(p) // spec.block_size for p in (positions[0], positions[-1]))
    parts, start = [], 0
    for own in range(first, last + 1):
        stop = min((own + 1) * spec.block_size - int(positions[0]), scores.shape[1])
        chosen = scores[:, start:stop, : own + 1].topk(spec.num_blocks, dim=-1, sorted=False).indices
        parts.append(chosen.sort(-1).values)
        start = stop
    return torch.cat(parts, 1)


def select_tile(
    q_HGTD: Tensor, k1_phases: Tensor, k2_HDn: Tensor, positions: Tensor, spec: BlockSpec, lse: str
) -> Tensor:
    """Blocks of one tile of queries at consecutive `positions`, each with at least K blocks: `[Hkv, T, K]`.

    q is already scaled. The compressed keys may reach beyond what the tile sees.
    """
    kv_heads, group, tile, _ = q_HGTD.shape
    ratio, device = spec.ratio, q_HGTD.device
    near = k1_phases.shape[-1] // ratio
    blocks = max(int(positions[-1]) // spec.block_size + 1, near + 1)
    pooled = q_HGTD.new_full((kv_heads, tile, blocks), -math.inf)
    if near:
        scores = q_HGTD @ k1_phases[:, None]  # [Hkv, G, T, r * near]
        window = torch.arange(ratio, device=device)[:, None] + ratio * torch.arange(near, device=device)
        ends = (window * spec.kernel_stride + spec.kernel_size - 1).view(-1)
        hidden_from = int(
            torch.searchsorted(
                torch.arange(near) * spec.block_size
                + spec.kernel_size
                - 1
                + (ratio - 1) * spec.kernel_stride,
                int(positions[0]),
                right=True,
            )
        )
        # Only the last blocks can hold windows that some query of the tile does not see yet.
        edge = scores.view(kv_heads, group, tile, ratio, near)[..., hidden_from:]
        late = ends.view(ratio, near)[:, hidden_from:] > positions[:, None, None]
        edge.masked_fill_(late, -math.inf)
        if lse == "coarse":
            seen2 = (
                (positions - (spec.coarse_size - 1)).div(spec.coarse_stride, rounding_mode="floor") + 1
            ).clamp(min=0)
            reach2 = int(seen2[-1])
            total = _masked_lse(q_HGTD @ k2_HDn[:, None, :, :reach2], seen2)
            if int(seen2[0]) == 0:
                total = torch.where((seen2 > 0)[:, None], total, scores.logsumexp(-1, keepdim=True))
        else:
            total = scores.logsumexp(-1, keepdim=True)
        total.masked_fill_(total == -math.inf, 0.0)  # no window visible: every score is -inf already
        p = scores.sub_(total).exp_().sum(1).view(kv_heads, tile, ratio, near)
        best = p.amax(2)
        torch.maximum(best[..., 1:], p[:, :, ratio - 1, :-1], out=best[..., 1:])
        pooled[..., :near] = best.clamp_(max=LARGEST)
        pooled[..., near] = p[:, :, ratio - 1, near - 1].clamp(
            max=LARGEST
        )  # the window before a block reaches into it
    return pick_blocks(pooled, positions, spec)


def pick_blocks(scores: Tensor, positions: Tensor, spec: BlockSpec) -> Tensor:
    """Forced blocks and the best of the others: scores `[Hkv, T, N]`, modified, -> `[Hkv, T, num_blocks]`,
    ascending."""
    own = positions.div(spec.block_size, rounding_mode="floor")[:, None]
    block = torch.arange(scores.shape[-1], device=scores.device)
    forced = (block < spec.init_blocks) | (
        own - block <= spec.window_blocks
    )  # later blocks are cut off in _top
    return _top(scores.masked_fill_(forced, math.inf), positions, spec)


def take_all(q: Tensor, kv_heads: int, length: int, spec: BlockSpec) -> tuple[Tensor, int]:
    """The result `[T, Hkv, num_blocks]` int32 with the rows filled for which there is room for all blocks,
    and their number."""
    first = length - q.shape[0]
    result = torch.full((q.shape[0], kv_heads, spec.num_blocks), -1, dtype=torch.int32, device=q.device)
    cut = max(0, min(q.shape[0], spec.num_blocks * spec.block_size - first))
    own = torch.arange(first, first + cut, device=q.device).div(spec.block_size, rounding_mode="floor")
    block = torch.arange(spec.num_blocks, device=q.device)
    result[:cut] = torch.where(block <= own[:, None], block, -1)[:, None].int()
    return result, cut


def select_sequence(
    q: Tensor, k1: Tensor, k2: Tensor, length: int, spec: BlockSpec, scale: float, lse: str
) -> Tensor:
    """One sequence: q `[T, Hq, D]` at the last T of `length` positions -> `[T, Hkv, num_blocks]` int32.

    Rows ascend and are padded with -1 at the end.
    """
    tokens, heads, dim = q.shape
    kv_heads = k1.shape[1]
    first = length - tokens
    result, cut = take_all(q, kv_heads, length, spec)
    if cut == tokens:
        return result

    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    for start in range(cut, tokens, SPAN):
        stop = min(start + SPAN, tokens)
        n1 = num_windows(first + stop, spec.kernel_size, spec.kernel_stride)
        n2 = num_windows(first + stop, spec.coarse_size, spec.coarse_stride)
        phases = _phase_major(k1[:n1].to(compute), spec.ratio)
        coarse = k2[:n2].to(compute).permute(1, 2, 0).contiguous()
        tile = max(16, TILE_ELEMENTS // (heads * max(1, phases.shape[-1])))
        for a in range(start, stop, tile):
            b = min(a + tile, stop)
            positions = torch.arange(first + a, first + b, device=q.device)
            queries = (q[a:b].to(compute) * scale).view(b - a, kv_heads, -1, dim).permute(1, 2, 0, 3)
            result[a:b] = select_tile(queries, phases, coarse, positions, spec, lse).transpose(0, 1)
    return result
