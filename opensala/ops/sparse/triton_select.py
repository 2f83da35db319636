# mypy: allow-untyped-defs
"""Block selection in Triton, in three steps whose costs are those of reading the compressed keys against
every query.

1. `lse_kernel`: the softmax denominators, by a running log-sum-exp over the second level (the first where
    asked).
2. `score_kernel`: probabilities of the first level, summed over the G heads of a kv head and max-pooled to
    block scores.
3. `top_kernel` (`triton_top`): the best blocks of each query.

Between 2 and 3 the pooled scores of a tile of queries, 1 / (G * ratio) of the scores computed, pass through a
scratch buffer of SCRATCH elements at most, so memory is linear in length. Keeping a running top-k in
registers instead needs a merge for nearly every panel of blocks up to some millions of tokens, which costs
more than writing and reading the scores; and with the scores in memory any number of programs can share one
query, so a decoding step is the same three kernels with the keys cut among programs.

The product of step 2 is K1 q^T: its columns are (head, query) pairs with the queries side by side, so that
each thread holds all heads of its queries and the sum over heads needs no exchange between threads. Its rows
are windows, one phase at a
time: row r of phase c is window c of block r of the panel, so pooling is an elementwise maximum over `ratio`
    products.
The window before a block also touches it: that is the last phase moved down by one row.

Scores are in base 2: p = exp2(factor * q.k - lse), factor = scale * log2(e).

Shapes: B rows, T queries, Hq/Hkv query/kv heads, G = Hq / Hkv, D head dim, n1/n2 windows, N blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, cdiv, computable, on_device, padded
from .pages import KVPages, PageTable
from .spec import BlockSpec
from .triton_compress import compress_packed, triton_extend_compressed
from .triton_rows import (
    COUNTS,
    Rows,
    cores,
    inner_contiguous,
    load_rows,
    phase_rows,
    positive_factor,
    rows_of,
    tile_of,
    window_rows,
    windows_in,
)
from .triton_top import top_blocks

SCRATCH = 1 << 26  # block scores held at once: 256 MB
PROGRAMS = 16  # programs of the score kernel for each multiprocessor that a call should have at least
LSE_PROGRAMS = 2  # the same of the log-sum-exp kernel
JOINED = tl.constexpr(1 << 12)  # denominators that a program of few queries reads at once


@triton.jit
def add_panels(
    peak, mass, query, keys, k_p, k_n, pages, lo, hi, visible, factor, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Running log-sum-exp of windows lo ... hi - 1 (rounded up to panels of BN); with MASK of the `visible`
    ones only."""
    for first in range(lo, hi, BN):
        window = first + tl.arange(0, BN)
        there = window < hi
        x = load_rows(keys, window_rows(window, there, k_p, k_n, pages, SIZE, STRIDE, BLOCK), there, D, DP)
        s = tl.dot(query, tl.trans(x.to(query.dtype)), input_precision="ieee")
        if MASK:
            s = tl.where(window[None, :] < visible[:, None], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, axis=1) * factor)
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASK else higher
        mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(s * factor - base[:, None]), axis=1)
        peak = higher
    return peak, mass


@triton.jit
def add_visible(
    peak, mass, query, keys, k_p, k_n, pages, room, position, last, part, parts, factor, D: tl.constexpr,
    DP: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running log-sum-exp of the windows of one level that each query sees: share `part` of `parts` of the
    panels."""
    visible = windows_in(position + 1, SIZE, STRIDE)
    all_see = windows_in(tl.min(position, axis=0) + 1, SIZE, STRIDE) // BN * BN
    reach = tl.minimum(windows_in(last + 1, SIZE, STRIDE), room)
    share = tl.cdiv(tl.cdiv(reach, BN), parts) * BN
    lo = part * share
    hi = tl.minimum(lo + share, reach)
    middle = tl.maximum(lo, tl.minimum(all_see, hi))
    peak, mass = add_panels(
        peak, mass, query, keys, k_p, k_n, pages, lo, middle, visible, factor, D, DP, BN, SIZE, STRIDE, BLOCK,
        False,
    )  # fmt: skip
    return add_panels(
        peak, mass, query, keys, k_p, k_n, pages, middle, hi, visible, factor, D, DP, BN, SIZE, STRIDE, BLOCK,
        True,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def lse_kernel(
    q, k1, k2, lse, lengths, cu, pages, sparse, q_b, q_t, q_h, k1_b, k1_n, k1_h, k2_b, k2_n, k2_h, room1,
    room2, tokens, length, documents, per_row, keep, shares, factor, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    COARSE: tl.constexpr, STEPS: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """lse `[shares, B, T, Hq]`: log2 of the softmax denominator of each query and head over a share of the
    panels.

    Tiles of which every query takes all its blocks (at most `keep`) are left out: nobody reads their scores.
    """
    part = tl.program_id(0) % shares
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    index = tl.num_programs(0) // shares - 1 - tl.program_id(0) // shares  # the longest first
    first, last, position0, n, start = tile_of(
        lengths, length, cu, documents, index.to(tl.int64), b, tokens, 0, tokens, BQ, STEPS, sparse
    )
    highest = (position0 + last - 1 - first).to(tl.int32)
    if (last <= first) | (highest // BLOCK < keep):
        return
    column = tl.arange(0, GP * BQ)
    g = column // BQ
    t = first + column % BQ
    position = tl.minimum(position0.to(tl.int32) + column % BQ, highest)
    there = (g < GROUP) & (t < last)
    query = load_rows(q, b * q_b + t * q_t + (h * GROUP + g) * q_h, there, D, DP)
    peak = tl.full((GP * BQ,), float("-inf"), tl.float32)
    mass = tl.zeros((GP * BQ,), tl.float32)
    if pages is None:
        keys1 = k1 + b * k1_b + h * k1_h + (start // STRIDE + n) * k1_n
        keys2 = k2 + b * k2_b + h * k2_h + (start // (4 * STRIDE) + n) * k2_n
    else:
        keys1 = k1 + h * k1_h
        keys2 = k2 + h * k2_h
        pages += n * per_row
    if COARSE:
        peak2, mass2 = add_visible(
            peak, mass, query, keys2, k2_b, k2_n, pages, room2, position, highest, part, shares, factor, D,
            DP, BN, 4 * SIZE, 4 * STRIDE, BLOCK,
        )  # fmt: skip
        if position0 + 1 < 4 * SIZE:  # no window of the second level: the first one serves
            peak, mass = add_visible(
                peak, mass, query, keys1, k1_b, k1_n, pages, room1, position, highest, part, shares, factor,
                D, DP, BN, SIZE, STRIDE, BLOCK,
            )  # fmt: skip
        coarse = position + 1 >= 4 * SIZE
        peak, mass = tl.where(coarse, peak2, peak), tl.where(coarse, mass2, mass)
    else:
        peak, mass = add_visible(
            peak, mass, query, keys1, k1_b, k1_n, pages, room1, position, highest, part, shares, factor, D,
            DP, BN, SIZE, STRIDE, BLOCK,
        )  # fmt: skip
    place = ((part * tl.num_programs(2) + b) * tokens + t) * (HEADS * GROUP) + h * GROUP + g
    tl.store(lse + place, peak + tl.log2(mass), mask=there)


@triton.jit(do_not_specialize=COUNTS)
def score_kernel(
    q, k1, lse, scores, lengths, cu, pages, sparse, q_b, q_t, q_h, k1_b, k1_n, k1_h, room1, tokens, length,
    begin, end, width, documents, per_row, shares, splits, factor, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, WINDOW: tl.constexpr,
    KEEP: tl.constexpr, MASK: tl.constexpr, STEPS: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    BQ: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """scores `[B, end - begin, Hkv, width]` of the blocks that are not forced by the window, for queries
    begin ... end - 1.

    A block without a visible window scores -1. The blocks a query sees in full need no mask; MASK is set
    where the window of forced blocks is too small to cover the others.
    """
    part = tl.program_id(0) % splits
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    index = tl.num_programs(0) // splits - 1 - tl.program_id(0) // splits
    first, last, position0, n, start = tile_of(
        lengths, length, cu, documents, index.to(tl.int64), b, tokens, begin, end, BQ, STEPS, sparse
    )
    highest = (position0 + last - 1 - first).to(tl.int32)
    own = highest // (RATIO * STRIDE)
    panels = tl.cdiv(tl.minimum(own - WINDOW, width), PB)
    share = tl.cdiv(panels, splits)
    lo = part * share
    hi = tl.minimum(lo + share, panels)
    if (last <= first) | (own < KEEP) | (lo >= hi):
        return
    column = tl.arange(0, GP * BQ)
    g = column // BQ
    t = first + column % BQ
    there = (g < GROUP) & (t < last) & (t >= begin)
    query = tl.trans(load_rows(q, b * q_b + t * q_t + (h * GROUP + g) * q_h, there, D, DP))
    total = joined_lse(
        lse,
        (b * tokens + t) * (HEADS * GROUP) + h * GROUP + g,
        there,
        tl.num_programs(2).to(tl.int64) * tokens * (HEADS * GROUP),
        shares,
        GP * BQ,
    )
    total = tl.where(g < GROUP, total, float("inf"))  # heads of the padding weigh nothing
    if pages is None:
        keys = k1 + b * k1_b + h * k1_h + (start // STRIDE + n) * k1_n
    else:
        keys = k1 + h * k1_h
        pages += n * per_row
    visible = tl.minimum(windows_in(highest + 1, SIZE, STRIDE), room1)
    row = tl.arange(0, PB)
    above = tl.broadcast_to(((row + PB - 1) % PB)[:, None], (PB, BQ))
    query_position = position0.to(tl.int32) + tl.arange(0, BQ)
    query_t = first + tl.arange(0, BQ)
    target = scores + (((b * (end - begin) + query_t - begin) * HEADS + h) * width)[None, :] + row[:, None]
    here = ((query_t < last) & (query_t >= begin))[None, :]
    best = tl.full((PB, BQ), -1.0, tl.float32)
    carried = tl.full((PB, BQ), -1.0, tl.float32)  # row 0: the last window of the block before this panel
    for i in range(tl.maximum(lo * RATIO - 1, 0), hi * RATIO):
        panel = i // RATIO
        phase = i % RATIO
        window = (panel * PB + row) * RATIO + phase
        seen = window < visible
        at = phase_rows(panel * PB + row, phase, seen, k1_b, k1_n, pages, SIZE, STRIDE, RATIO)
        x = load_rows(keys, at, seen, D, DP).to(query.dtype)
        s = tl.dot(x, query, input_precision="ieee")
        p = tl.exp2(s * factor - total[None, :])
        p = tl.sum(tl.reshape(p, (PB, GP, BQ)), axis=1)
        if MASK:
            p = tl.where(window[:, None] * STRIDE + (SIZE - 1) <= query_position[None, :], p, -1.0)
        best = tl.where(phase == 0, p, tl.maximum(best, p))
        if phase == RATIO - 1:
            moved = tl.gather(p, above, 0)
            pooled = tl.maximum(best, tl.where(row[:, None] == 0, carried, moved))
            carried = moved
            block = panel * PB + row
            tl.store(
                target + panel.to(tl.int64) * PB,
                pooled,
                mask=here & ((block < width) & (block >= lo * PB))[:, None],
            )


@triton.jit
def joined_lse(lse, place, there, step, shares, COLUMNS: tl.constexpr):
    """log2 of the sum of the denominators of all shares; 0 where nothing was visible.

    All that a decoding step has on a GPU are read at once: one after the other each would wait for memory.
    Prefill has few shares.
    """
    TOGETHER: tl.constexpr = JOINED // COLUMNS if COLUMNS <= 32 else 8
    peak = tl.full((COLUMNS,), float("-inf"), tl.float32)
    mass = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, shares, TOGETHER):
        n = first + tl.arange(0, TOGETHER)
        each = tl.load(
            lse + place[None, :] + n[:, None] * step,
            mask=there[None, :] & (n < shares)[:, None],
            other=float("-inf"),
        )
        higher = tl.maximum(peak, tl.max(each, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(each - base[None, :]), axis=0)
        peak = higher
    return tl.where(mass > 0, peak + tl.log2(mass), 0.0)


def tile_config(tokens: int, group: int, dim: int, itemsize: int) -> dict[str, int]:
    """Queries of a tile: as many as fill the columns of a product, or as there are."""
    heads = 1 << (group - 1).bit_length()
    columns = (128 if dim <= 128 else 64) if itemsize == 2 else 32
    if triton_interpreted():
        columns = 256  # fewer programs: it is their number that takes the interpreter's time
    queries = max(1, min(columns // heads, 1 << (tokens - 1).bit_length()))
    return {"GP": heads, "BQ": max(queries, 16 // heads), "DP": padded(dim)}


def score_config(tokens: int, group: int, dim: int, itemsize: int) -> dict[str, int]:
    tile = tile_config(tokens, group, dim, itemsize)
    return {**tile, "PB": 64 if itemsize == 2 else 32, "num_warps": 4, "num_stages": 2}


def lse_config(tokens: int, group: int, dim: int, itemsize: int) -> dict[str, int]:
    return {
        **tile_config(tokens, group, dim, itemsize),
        "BN": 64 if itemsize == 2 else 32,
        "num_warps": 4 if itemsize == 2 else 8,
        # fetching wide float32 keys ahead through a page table spills (5 KB a thread, by compilation)
        "num_stages": 1 if itemsize == 4 and dim > 128 else 2,
    }


def _compressed(k: Tensor, size: int, stride: int, rows: Rows) -> Tensor:
    """All windows of k; those of packed documents in the documents' slots."""
    if rows.cu is not None:
        return compress_packed(k, size, stride, rows)
    out = torch.empty(
        k.shape[0], max(1, cdiv(k.shape[1], stride)), *k.shape[2:], dtype=k.dtype, device=k.device
    )
    triton_extend_compressed(k, out, 0, k.shape[1], size, stride)
    return out


def _denominators(
    q: Tensor, k1: Tensor, k2: Tensor, spec: BlockSpec, rows: Rows, factor: float, coarse: bool
) -> Tensor:
    """Shares of the softmax denominators, `[shares, B, T, Hq]` in base 2."""
    (batch, tokens, heads, dim), kv_heads = q.shape, k1.shape[2]
    config = lse_config(rows.together, heads // kv_heads, dim, q.element_size())
    tiles = rows.tiles(config["BQ"], 0, tokens)
    panels = cdiv(rows.windows(k2 if coarse else k1), config["BN"])
    shares = max(1, min(panels, cdiv(LSE_PROGRAMS * cores(q.device), batch * kv_heads * tiles)))
    lse = torch.empty(shares, batch, tokens, heads, dtype=torch.float32, device=q.device)
    with on_device(q):
        lse_kernel[(tiles * shares, kv_heads, batch)](
            q, k1, k2, lse, rows.lengths, rows.cu, rows.pages, rows.sparse, *q.stride()[:3],
            *k1.stride()[:3], *k2.stride()[:3], rows.windows(k1), rows.windows(k2), tokens, rows.length,
            rows.documents, rows.per_row, spec.num_blocks, shares, factor, HEADS=kv_heads,
            GROUP=heads // kv_heads, D=dim, SIZE=spec.kernel_size, STRIDE=spec.kernel_stride,
            BLOCK=spec.block_size, COARSE=coarse, STEPS=rows.steps, **config,
        )  # fmt: skip
    return lse


def _scores(
    q: Tensor, k1: Tensor, lse: Tensor, spec: BlockSpec, rows: Rows, factor: float, begin: int, end: int,
    width: int,
) -> Tensor:  # fmt: skip
    """Block scores `[B, end - begin, Hkv, width]` of queries begin ... end - 1; entries that nobody reads are
    not written."""
    (batch, tokens, heads, dim), kv_heads = q.shape, k1.shape[2]
    config = score_config(min(end - begin, rows.together), heads // kv_heads, dim, q.element_size())
    tiles = rows.tiles(config["BQ"], begin, end)
    splits = max(
        1, min(cdiv(width, config["PB"]), cdiv(PROGRAMS * cores(q.device), batch * kv_heads * tiles))
    )
    scores = torch.empty(batch, end - begin, kv_heads, width, dtype=torch.float32, device=q.device)
    # Windows of the blocks that are not forced end before the first query that has them so: then
    # nothing needs a mask.
    masked = (
        spec.block_size - spec.kernel_stride + spec.kernel_size - 1
        > (spec.window_blocks + 1) * spec.block_size
    )
    with on_device(q):
        score_kernel[(tiles * splits, kv_heads, batch)](
            q, k1, lse, scores, rows.lengths, rows.cu, rows.pages, rows.sparse, *q.stride()[:3],
            *k1.stride()[:3], rows.windows(k1), tokens, rows.length, begin, end, width, rows.documents,
            rows.per_row, lse.shape[0], splits, factor, HEADS=kv_heads, GROUP=heads // kv_heads, D=dim,
            SIZE=spec.kernel_size, STRIDE=spec.kernel_stride,
            RATIO=spec.ratio, WINDOW=spec.window_blocks, KEEP=spec.num_blocks, MASK=masked, STEPS=rows.steps,
            **config,
        )  # fmt: skip
    return scores


def triton_select_blocks(
    q: Tensor, k: Tensor | None, spec: BlockSpec, compressed: tuple[Tensor, Tensor] | None,
    lengths: Tensor | int | None, scale: float, lse: str, cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `select_blocks`. Compressed keys that are not given are made here, those of packed documents one by
    one."""
    if k is not None:
        capacity = k.shape[1]
    else:  # what the windows given can have come from, and the keys of the unfinished one
        assert compressed is not None, "checked by select_blocks"
        capacity = (compressed[0].shape[1] + 1) * spec.kernel_stride + spec.kernel_size
    rows = rows_of(q, capacity, lengths, cu_seqlens)
    if compressed is None or cu_seqlens is not None:
        assert k is not None, "checked by select_blocks"
        keys = inner_contiguous(computable(k))
        compressed = (
            _compressed(keys, spec.kernel_size, spec.kernel_stride, rows),
            _compressed(keys, spec.coarse_size, spec.coarse_stride, rows),
        )
    common = torch.promote_types(q.dtype, compressed[0].dtype)
    queries, k1, k2 = (inner_contiguous(computable(x.to(common))) for x in (q, *compressed))
    most = capacity if rows.lengths is not None else rows.length
    return _best_blocks(queries, k1, k2, spec, rows, scale, lse, cdiv(most, spec.block_size))


def triton_select_paged(
    q: Tensor, pool: KVPages, table: PageTable, spec: BlockSpec, scale: float, lse: str
) -> Tensor:
    """See `select_blocks_paged`, exact search. Nothing waits for the GPU."""
    queries = inner_contiguous(computable(q.detach()))[None]
    width = table.pages.shape[1]
    rows = Rows(
        q.shape[0], width * spec.block_size, 0, table.lengths, table.cu_seqlens, None, table.pages,
        table.sparse,
    )  # fmt: skip
    return _best_blocks(queries, computable(pool.k1), computable(pool.k2), spec, rows, scale, lse, width)[0]


def _best_blocks(
    q: Tensor, k1: Tensor, k2: Tensor, spec: BlockSpec, rows: Rows, scale: float, lse: str, blocks: int
) -> Tensor:
    """Block numbers `[B, T, Hkv, num_blocks]`; no row has more than `blocks` blocks."""
    batch, tokens, kv_heads = *q.shape[:2], k1.shape[2]
    width = cdiv(blocks, 16) * 16
    out = torch.empty(batch, tokens, kv_heads, spec.num_blocks, dtype=torch.int32, device=q.device)
    q, factor = positive_factor(q, scale)
    shares = _denominators(q, k1, k2, spec, rows, factor, lse == "coarse")
    chunk = max(64, SCRATCH // (batch * kv_heads * width) // 64 * 64)
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        scores = _scores(q, k1, shares, spec, rows, factor, begin, end, width)
        top_blocks(scores, out, spec, rows, begin, end)
    return out


TABLES = ("lengths", "cu", "pages", "sparse")


def _case_types(
    dtype: str, pointers: tuple[str, ...], integers: tuple[str, ...], given: dict[str, None]
) -> dict[str, str]:
    types = dict.fromkeys(integers, "i32")
    types.update(
        {p: "*fp32" if p in ("lse", "scores") else "*i32" if p in TABLES else f"*{dtype}" for p in pointers}
    )
    return {"factor": "fp32", **{name: kind for name, kind in types.items() if name not in given}}


def compile_cases(arch: int) -> CompileCases:
    """Prefill and decoding at the released sizes, wide heads, and float32: exact denominators, a small
    window, documents."""
    spec = BlockSpec()
    plain = {"pages": None, "sparse": None}
    for name, dtype, tokens, group, dim, given in (
        ("prefill", "bf16", 4096, 16, 128, {"lengths": None, "cu": None, **plain}),
        ("decode", "bf16", 1, 16, 128, {"cu": None, **plain}),
        ("pages prefill", "bf16", 4096, 16, 128, {}),
        ("pages decode", "bf16", 1, 16, 128, {}),
        ("wide", "bf16", 4096, 4, 256, {"lengths": None, "cu": None, **plain}),
        ("pages wide", "bf16", 4096, 4, 256, {}),
        ("float", "fp32", 4096, 2, 64, {"lengths": None, **plain}),
        ("float wide", "fp32", 4096, 2, 256, {"lengths": None, **plain}),
        ("pages float wide", "fp32", 4096, 2, 256, {}),
    ):
        common = {
            "HEADS": 2,
            "GROUP": group,
            "D": dim,
            "SIZE": spec.kernel_size,
            "STRIDE": spec.kernel_stride,
            "STEPS": 4,
            **given,
        }
        size = 4 if dtype == "fp32" else 2
        counts = ("room1", "tokens", "length", "documents", "per_row", "shares")
        places = ("q_b", "q_t", "q_h", "k1_b", "k1_n", "k1_h")
        for config, kernel, pointers, integers, more in (
            (
                lse_config(tokens, group, dim, size),
                lse_kernel,
                ("q", "k1", "k2", "lse", *TABLES),
                (*places, "k2_b", "k2_n", "k2_h", *counts, "room2", "keep"),
                {"COARSE": name != "float", "BLOCK": spec.block_size},
            ),
            (
                score_config(tokens, group, dim, size),
                score_kernel,
                ("q", "k1", "lse", "scores", *TABLES),
                (*places, *counts, "begin", "end", "width", "splits"),
                {
                    "RATIO": spec.ratio,
                    "WINDOW": spec.window_blocks,
                    "KEEP": spec.num_blocks,
                    "MASK": name == "float",
                },
            ),
        ):
            options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
            types = _case_types(dtype, pointers, integers, given)
            yield CompileCase(
                f"{kernel.__name__} {name}", kernel, types, {**common, **more, **config}, options
            )
