# mypy: allow-untyped-defs
"""Block-sparse attention in Triton, block by block: the forward pass of long calls.

Walking the list of one query moves a block's keys and values (32 KB at the released sizes) through the L2
cache for 16 rows
of a product, far too little work for the bytes: 1.6 TB a layer at 256K tokens. So the work is turned around:

1. The blocks just before a query are in every list (the local window). A tile of neighbouring queries sees
   those that all of them list, without a gap up to their own, by ordinary flash attention: `low_kernel` finds
       them, `band_kernel` attends.
2. The other (query, block) pairs are sorted by block (`triton_index`); `pair_kernel` loads a block once and
   attends with all queries that chose it. Each pair leaves a partial result of its own, normalised, in the
   dtype of the queries.
3. `merge_kernel` joins the partial results of each query by their log-sum-exp.

The partial results take 1/8 of the bytes of 32 KB a pair, written and read once. Queries go through in chunks
whose partial results fit PART_BYTES; nothing is added to shared memory locations, so results do not depend on
timing.

Shapes: B rows, T queries, K blocks of a list, G query heads a kv head, D/E key/value dim, S keys of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, arch_of, cdiv, on_device, padded
from .triton_attend import SIZES, add_rows, case_types, merge
from .triton_index import block_of, invert, place_of, segment_of
from .triton_rows import COUNTS, Rows, load_rows, tile_of

PART_BYTES = 1 << 30  # of partial results at once
SEGMENT = 64  # pairs of a block that one program attends
LEAST_QUERIES = 128  # below, or with less than SHARED pairs a block, queries go one by one
SHARED = 2
WIDEST_BLOCK = 128
BLOCK_BYTES = 64 * 1024  # of keys and values of one block: what a program holds without spilling
REACH = 62  # blocks before its own that a query's band can have: they are bits of one number


@triton.jit(do_not_specialize=COUNTS)
def low_kernel(
    blocks, lows, lengths, cu, sparse, tokens, length, begin, end, documents, HEADS: tl.constexpr,
    LIST: tl.constexpr, LIST_P: tl.constexpr, SIZE: tl.constexpr, REACH: tl.constexpr, BQ: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """lows `[B, tiles, Hkv]`: the first block of which all queries of a tile list every block from there to
    their own."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    index = tl.program_id(0).to(tl.int64)
    first, last, position0, _, _ = tile_of(
        lengths, length, cu, documents, index, b, tokens, begin, end, BQ, STEPS, sparse
    )
    t = first + tl.arange(0, BQ)
    there = (t < last) & (t >= begin)
    j = tl.arange(0, LIST_P)
    place = ((b * (end - begin) + t - begin) * HEADS + h) * LIST
    block = tl.load(
        blocks + place[:, None] + j[None, :], mask=there[:, None] & (j < LIST)[None, :], other=-1
    ).to(tl.int32)
    own = (position0.to(tl.int32) + tl.arange(0, BQ)) // SIZE
    back = own[:, None] - block
    near = (block >= 0) & (back >= 0) & (back <= REACH)
    one = tl.full((BQ, LIST_P), 1, tl.int64)
    listed = tl.sum(
        tl.where(near, one << tl.where(near, back, 0).to(tl.int64), 0), axis=1
    )  # bit i: the block i before its own
    run = tl.arange(0, 64)
    full = (tl.full((64,), 1, tl.int64) << run.to(tl.int64)) - 1
    fits = (listed[:, None] & full[None, :]) == full[None, :]
    runs = tl.max(tl.where(fits & (run <= REACH + 1)[None, :], run[None, :], 0), axis=1)
    low = tl.max(tl.where(there, own - runs + 1, 0), axis=0)
    tl.store(lows + (b * tl.num_programs(0) + index) * HEADS + h, low)


@triton.jit
def token_rows(token, there, x_b, x_t, pages, SIZE: tl.constexpr):
    """Offsets of tokens: one behind another, x_t apart, or in pages of SIZE tokens, x_b apart."""
    if pages is None:
        return token.to(tl.int64) * x_t
    else:
        page = tl.load(pages + token // SIZE, mask=there, other=0).to(tl.int64)
        return page * x_b + token % SIZE * x_t


@triton.jit
def add_keys(
    peak, mass, total, query, keys, values, k_b, k_t, v_b, v_t, pages, lo, hi, position, factor,
    SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over tokens lo ... hi - 1; with MASK each query sees those up to its position."""
    for first in range(lo, hi, BN):
        token = first + tl.arange(0, BN)
        there = token < hi
        peak, mass, total = add_rows(
            peak, mass, total, query, keys, values, token_rows(token, there, k_b, k_t, pages, SIZE),
            token_rows(token, there, v_b, v_t, pages, SIZE), there, token[None, :] <= position[:, None],
            factor, D, DP, E, EP, MASK,
        )  # fmt: skip
    return peak, mass, total


@triton.jit(do_not_specialize=COUNTS)
def band_kernel(
    q, k, v, lows, parts, part_lse, lengths, cu, pages, sparse, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    tokens, length, begin, end, documents, per_row, factor, HEADS: tl.constexpr, GROUP: tl.constexpr,
    LIST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr,
    GP: tl.constexpr, BQ: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Part LIST of each query: attention of a tile of queries over the blocks they list together."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    index = tl.program_id(0).to(tl.int64)
    first, last, position0, n, start = tile_of(
        lengths, length, cu, documents, index, b, tokens, begin, end, BQ, STEPS, sparse
    )
    if last <= first:
        return
    highest = (position0 + last - 1 - first).to(tl.int32)
    row = tl.arange(0, GP * BQ)
    g = row % GP
    t = first + row // GP
    there = (g < GROUP) & (t < last) & (t >= begin)
    position = tl.minimum(position0.to(tl.int32) + row // GP, highest)
    query = load_rows(q, b * q_b + t * q_t + (h * GROUP + g) * q_h, there, D, DP)
    keys = k + h * k_h
    values = v + h * v_h
    if pages is None:
        keys += b * k_b + start * k_t
        values += b * v_b + start * v_t
    else:
        pages += n * per_row
    lo = tl.load(lows + (b * tl.num_programs(0) + index) * HEADS + h) * SIZE
    middle = tl.maximum(
        lo, lo + (position0.to(tl.int32) + 1 - lo) // BN * BN
    )  # up to here every query sees every key
    peak = tl.full((GP * BQ,), float("-inf"), tl.float32)
    mass = tl.zeros((GP * BQ,), tl.float32)
    total = tl.zeros((GP * BQ, EP), tl.float32)
    peak, mass, total = add_keys(
        peak, mass, total, query, keys, values, k_b, k_t, v_b, v_t, pages, lo, middle, position, factor, SIZE,
        D, DP, E, EP, BN, False,
    )  # fmt: skip
    peak, mass, total = add_keys(
        peak, mass, total, query, keys, values, k_b, k_t, v_b, v_t, pages, middle, highest + 1, position,
        factor, SIZE, D, DP, E, EP, BN, True,
    )  # fmt: skip
    place = (((b * (end - begin) + t - begin) * HEADS + h) * (LIST + 1) + LIST) * GROUP + g
    tl.store(part_lse + place, peak + tl.log2(mass), mask=there)
    e = tl.arange(0, EP)
    total = total * (1 / tl.where(mass > 0, mass, 1.0))[:, None]
    tl.store(
        parts + place[:, None] * E + e[None, :],
        total.to(parts.dtype.element_ty),
        mask=there[:, None] & (e < E)[None, :],
    )


@triton.jit
def of_rows(x, PQ: tl.constexpr, GP: tl.constexpr):
    """One value for each pair, `[PQ]`, repeated for the GP rows of its heads: `[PQ * GP]`."""
    return tl.reshape(tl.broadcast_to(x[:, None], (PQ, GP)), (PQ * GP,))


@triton.jit(do_not_specialize=COUNTS)
def pair_kernel(
    q, k, v, blocks, parts, part_lse, order, bounds, firsts, bin_of, lengths, cu, number, pages, q_b, q_t,
    q_h, k_b, k_t, k_h, v_b, v_t, v_h, tokens, length, begin, count, documents, slots, bins, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LIST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, LENGTH: tl.constexpr, STEPS: tl.constexpr, GP: tl.constexpr, PQ: tl.constexpr,
    DP: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """parts `[B, count, Hkv, LIST + 1, G, E]` and part_lse: a block against a segment of the queries that
    chose it."""
    mine, first_pair, last_pair = segment_of(bin_of, bounds, firsts, bins, LENGTH)
    if mine >= bins:
        return
    slot, h, b = place_of(mine, slots, HEADS)
    b32 = b.to(tl.int32)
    inside = tl.arange(0, SP)
    if pages is None:
        block, start, keys, shift = block_of(slot, b, lengths, length, cu, documents, tokens, SIZE, STEPS)
        k += b * k_b + (start + block * SIZE) * k_t
        v += b * v_b + (start + block * SIZE) * v_t
        shift -= block * SIZE  # from a query to the number of the last key of this block that it sees
        keys -= block * SIZE
        shift32 = shift.to(tl.int32)
    else:  # the bin is a page; it is full in all its sequences, or has only one
        one = tl.load(order + first_pair)
        owner = tl.load(number + begin + one // (HEADS * LIST))
        keys = tl.load(lengths + owner).to(tl.int64) - tl.load(blocks + one).to(tl.int64) * SIZE
        k += slot * k_b
        v += slot * v_b
    there = inside < tl.minimum(keys, SIZE)
    q += b * q_b + h * GROUP * q_h
    x = load_rows(k, h * k_h + inside.to(tl.int64) * k_t, there, D, DP).to(q.dtype.element_ty)
    y = load_rows(v, h * v_h + inside.to(tl.int64) * v_t, there, E, EP).to(q.dtype.element_ty)
    e = tl.arange(0, EP)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    q_cells = g[:, None] * q_h + d[None, :]
    out_cells = g[:, None] * E + e[None, :]
    for i in range(first_pair, last_pair, PQ):
        # What concerns a pair is worked out once, in 32 bits, and then handed to the rows of its heads.
        ranks = i + tl.arange(0, PQ)
        pair = tl.load(order + ranks, mask=ranks < last_pair, other=0).to(tl.int32)
        t = begin + (pair // (HEADS * LIST) - b32 * count)
        if pages is None:
            reach = t + shift32
        else:
            n = tl.load(number + t)
            first_key = tl.load(blocks + pair) * SIZE
            reach = (t + tl.load(lengths + n) - tl.load(cu + n + 1)).to(tl.int32) - first_key
        used = (ranks < last_pair)[:, None] & (g < GROUP)[None, :]
        query = tl.load(
            q + (t.to(tl.int64) * q_t)[:, None, None] + q_cells[None, :, :],
            mask=used[:, :, None] & (d < D)[None, None, :],
            other=0.0,
        )
        query = tl.reshape(query, (PQ * GP, DP))
        s = tl.dot(query, tl.trans(x), input_precision="ieee")
        s = tl.where(there[None, :] & (inside[None, :] <= of_rows(reach, PQ, GP)[:, None]), s, float("-inf"))
        peak = tl.max(s, axis=1) * factor
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # rows of the padding
        p = tl.exp2(s * factor - peak[:, None])
        mass = tl.sum(p, axis=1)
        p = p * (1 / tl.where(mass > 0, mass, 1.0))[:, None]
        result = tl.dot(p.to(y.dtype), y, input_precision="ieee")
        place = (pair + pair // LIST).to(tl.int64) * GROUP
        tl.store(
            part_lse + place[:, None] + g[None, :],
            tl.reshape(peak + tl.log2(mass), (PQ, GP)),
            mask=used,
        )
        tl.store(
            parts + (place * E)[:, None, None] + out_cells[None, :, :],
            tl.reshape(result.to(parts.dtype.element_ty), (PQ, GP, EP)),
            mask=used[:, :, None] & (e < E)[None, None, :],
        )


def band_config(
    tokens: int, group: int, dim: int, value_dim: int, itemsize: int, arch: int
) -> dict[str, int]:
    """Tile of `band_kernel`: by compilation, the largest whose sums stay in registers on each
    architecture."""
    wide, deep, heads = padded(dim), padded(value_dim), 1 << (group - 1).bit_length()
    widest = max(wide, deep)
    if itemsize == 4:
        rows = 32 if widest <= 64 else 16
    else:
        rows = 64 if widest > 128 else 128
    if triton_interpreted():
        rows = 256
    queries = max(16 // heads, min(rows // heads, 1 << (tokens - 1).bit_length()), 1)
    return {
        "GP": heads,
        "BQ": queries,
        "DP": wide,
        "EP": deep,
        "BN": 64 if itemsize == 2 and widest <= 128 and arch == 90 else 32,
        "num_warps": 8 if queries * heads > 32 or itemsize == 4 else 4,
        "num_stages": 2,
    }


def pair_config(group: int, size: int, dim: int, value_dim: int, itemsize: int, arch: int) -> dict[str, int]:
    """Tile of `pair_kernel`, chosen likewise; a block stays in registers or shared memory beside it
    (`BLOCK_BYTES`)."""
    wide, deep, heads = padded(dim), padded(value_dim), 1 << (group - 1).bit_length()
    large = max(wide, deep) > 128 or size > 64
    if itemsize == 4:
        rows, warps, stages = 16, 8, 1
    elif arch == 90:
        rows, warps, stages = (64, 4, 2) if large else (64, 4, 3)
    else:
        rows, warps, stages = (32, 4, 2) if large else (64, 4, 2)
    if triton_interpreted():
        rows = 256
    return {
        "GP": heads,
        "PQ": max(1, rows // heads),
        "DP": wide,
        "EP": deep,
        "SP": padded(size),
        "num_warps": warps,
        "num_stages": stages,
    }


def shared_enough(q: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows) -> bool:
    """Whether many queries share each key block, and the kernels can hold one."""
    tokens, width = q.shape[1], v.shape[3]
    pairs = min(tokens, chunk_of(q, blocks, width)) * blocks.shape[3]
    most = cdiv(rows.capacity, size) if rows.pages is None else rows.per_row
    return (
        tokens - rows.documents * (rows.pages is not None) >= LEAST_QUERIES
        and pairs >= SHARED * most
        and block_fits(q.shape[3], width, size, q.element_size())
    )


def block_fits(dim: int, value_dim: int, size: int, itemsize: int) -> bool:
    return size <= WIDEST_BLOCK and padded(size) * (padded(dim) + padded(value_dim)) * itemsize <= BLOCK_BYTES


def chunk_of(q: Tensor, blocks: Tensor, width: int) -> int:
    """Queries whose partial results fit PART_BYTES, a multiple of 64 of them."""
    bytes_of_one = q.shape[2] * (blocks.shape[3] + 1) * (width * q.element_size() + 4)
    return max(64, PART_BYTES // bytes_of_one // 64 * 64)


def attend_by_block(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows, factor: float
) -> tuple[Tensor, Tensor]:
    """out `[B, T, Hq, E]` in q's dtype and lse `[B, T, Hq]` in base 2; every head of q, k, v contiguous."""
    (batch, tokens, heads, _), width = q.shape, v.shape[3]
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=q.device)
    chunk = chunk_of(q, blocks, width)
    # The results of a chunk lie side by side for one row, or for whole rows.
    together = batch if batch * tokens <= chunk else 1
    for row in range(0, batch, together):
        a = slice(row, row + together)
        mine = rows._replace(lengths=None if rows.lengths is None else rows.lengths[a])
        for begin in range(0, tokens, chunk):
            b = slice(begin, min(begin + chunk, tokens))
            attend_chunk(q[a], k[a], v[a], blocks[a, b], size, mine, factor, begin, out[a, b], lse[a, b])
    return out, lse


def attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows, factor: float, begin: int,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill out and lse `[B, count, Hq, ...]` from blocks `[B, count, Hkv, K]` of the queries from `begin` on.

    With pages, k and v are `[pages, S, Hkv, D]`; queries of sequences that are not sparse get zeros.
    """
    (batch, count, kv_heads, chosen), (heads, dim), width = blocks.shape, q.shape[2:], v.shape[3]
    group, end, item = heads // kv_heads, begin + count, q.element_size()
    parts = torch.empty(batch, count, kv_heads, chosen + 1, group, width, dtype=q.dtype, device=q.device)
    part_lse = torch.full(parts.shape[:-1], float("-inf"), dtype=torch.float32, device=q.device)
    common = {"HEADS": kv_heads, "LIST": chosen, "SIZE": size, "STEPS": rows.steps}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    arch = arch_of(q.device)
    band = band_config(count, group, dim, width, item, arch)
    tiles = rows.tiles(band["BQ"], begin, end)
    lows = torch.empty(batch, tiles, kv_heads, dtype=torch.int32, device=q.device)
    with on_device(q):
        low_kernel[(tiles, kv_heads, batch)](
            blocks, lows, rows.lengths, rows.cu, rows.sparse, rows.tokens, rows.length, begin, end,
            rows.documents, LIST_P=1 << (chosen - 1).bit_length(), REACH=REACH, BQ=band["BQ"], num_warps=4,
            **common,
        )  # fmt: skip
        band_kernel[(tiles, kv_heads, batch)](
            q, k, v, lows, parts, part_lse, rows.lengths, rows.cu, rows.pages, rows.sparse, *strides,
            rows.tokens, rows.length, begin, end, rows.documents, rows.per_row, factor, GROUP=group, D=dim,
            E=width, **common, **band,
        )  # fmt: skip
    index = invert(blocks, size, rows, SEGMENT, begin, lows, band["BQ"])
    with on_device(q):
        pair_kernel[(index.bin_of.numel(),)](
            q, k, v, blocks, parts, part_lse, index.order, index.bounds, index.firsts, index.bin_of,
            rows.lengths, rows.cu, rows.number, rows.pages, *strides, rows.tokens, rows.length, begin, count,
            rows.documents, index.slots, index.bins, factor, GROUP=group, D=dim, E=width, LENGTH=index.length,
            **common, **pair_config(group, size, dim, width, item, arch),
        )  # fmt: skip
    merge(parts, part_lse, out, lse, chosen + 1, (chosen + 1) * group, group, group)


def compile_cases(arch: int) -> CompileCases:
    """All sizes; the first with lengths on the device, the others with packed documents; some with pages."""
    integers = ("begin", "end", "count", "documents", "slots", "bins")
    kinds = {
        **dict.fromkeys(integers, "i32"),
        **dict.fromkeys(("order", "bounds", "firsts", "bin_of"), "*i64"),
        "lows": "*i32",
        "part_lse": "*fp32",
    }
    for name, dtype, group, size, dim in SIZES:
        item = 4 if dtype == "fp32" else 2
        if not block_fits(dim, dim, size, item):
            continue
        band = band_config(4096, group, dim, dim, item, arch)
        common = {
            "HEADS": 2,
            "GROUP": group,
            "LIST": 96,
            "SIZE": size,
            "D": dim,
            "E": dim,
            "STEPS": 4,
            "LENGTH": SEGMENT,
            "LIST_P": 128,
            "REACH": REACH,
        }
        contiguous = ("lengths",) if name else ("cu", "number")
        ways = (
            [(*contiguous, "pages", "sparse"), ()] if dtype == "bf16" else [(*contiguous, "pages", "sparse")]
        )
        for absent in ways:
            for kernel, config in (
                (low_kernel, {"BQ": band["BQ"], "num_warps": 4, "num_stages": 2}),
                (band_kernel, dict(band)),
                (pair_kernel, pair_config(group, size, dim, dim, item, arch)),
            ):
                options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
                constants = {**common, **config, **dict.fromkeys(absent)}
                constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
                types = case_types(kernel, dtype, constants, **kinds)
                title = f"{kernel.__name__}{name}{' pages' * (not absent)}"
                yield CompileCase(title, kernel, types, constants, options)
