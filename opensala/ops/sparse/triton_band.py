# mypy: allow-untyped-defs
"""Attention of a tile of neighbouring queries over the blocks they share: the larger part of a long call.

The rows of a tile are BQ queries times the G heads that share a list. They go through the tile's shared
blocks (`triton_shared`) by online softmax, a block loaded once for all; a row whose query does not list the
block gets the weight exp2(-inf) through the maximum that is subtracted, which costs nothing for each score.
Only the last blocks, in which the tile itself lies, need a mask for each score.

Shapes: B rows, T queries, G query heads a kv head, BQ queries of a tile, D/E key/value dim.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, on_device, padded
from .triton_attend import SIZES, add_rows, case_types
from .triton_rows import COUNTS, Rows, load_rows, tile_of
from .triton_shared import LIMITS, MOST_QUERIES, Shared, bits_of

# Rows of a tile in half precision. Two programs of 64 fit a multiprocessor of Hopper and could hide each
# other's softmax, but they read twice the keys and values: 64 KB in the 1,000 clocks of their products, twice
# what its L2 cache delivers. Not measured yet.
HALF_ROWS = 128


@triton.jit
def rows_at(x, at, inside, x_t, SIZE: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Rows `[BN, WIDE]` of a block that begins at offset `at`; none of them is missing where BN divides
    SIZE."""
    cells = inside.to(tl.int64)[:, None] * x_t + tl.arange(0, WIDE)[None, :]
    if SIZE % BN == 0 and DIM == WIDE:
        return tl.load(x + at + cells)
    else:
        mask = (inside < SIZE)[:, None] & (tl.arange(0, WIDE) < DIM)[None, :]
        return tl.load(x + at + cells, mask=mask, other=0.0)


@triton.jit
def add_shared(
    peak, mass, total, query, keys, values, k_s, k_t, v_s, v_t, numbers, members, count, i_of, factor,
    SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Online softmax over `count` whole blocks, `k_s` and `v_s` apart; a row sees those whose member is its
    query, number `i_of`."""
    PARTS: tl.constexpr = (SIZE + BN - 1) // BN
    number = tl.load(numbers, mask=count > 0, other=0)
    listed = tl.load(members, mask=count > 0, other=0)
    for i in range(0, count * PARTS):
        following = (i + 1) // PARTS  # its number is on its way while this block is attended
        next_number = tl.load(numbers + following, mask=following < count, other=0)
        next_listed = tl.load(members + following, mask=following < count, other=0)
        inside = i % PARTS * BN + tl.arange(0, BN)
        x = rows_at(keys, number.to(tl.int64) * k_s, inside, k_t, SIZE, BN, D, DP).to(query.dtype)
        s = tl.dot(query, tl.trans(x), input_precision="ieee")
        if SIZE % BN != 0:
            s = tl.where((inside < SIZE)[None, :], s, float("-inf"))
        member = ((listed >> i_of) & 1) != 0
        higher = tl.where(member, tl.maximum(peak, tl.max(s, axis=1) * factor), peak)
        p = tl.exp2(s * factor - tl.where(member, higher, float("inf"))[:, None])
        shrink = tl.exp2(peak - tl.where(higher == float("-inf"), 0.0, higher))
        mass = mass * shrink + tl.sum(p, axis=1)
        y = rows_at(values, number.to(tl.int64) * v_s, inside, v_t, SIZE, BN, E, EP).to(query.dtype)
        total = tl.dot(p.to(y.dtype), y, total * shrink[:, None], input_precision="ieee")
        peak = higher
        number = next_number
        listed = next_listed
    return peak, mass, total


@triton.jit
def add_near(
    peak, mass, total, query, keys, values, k_s, k_t, v_s, v_t, pages, marks, past, highest, position, i_of,
    factor, BQ: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Online softmax over the blocks from `past` on up to token `highest`: rows see those of their lists, up
    to their position."""
    PARTS: tl.constexpr = (SIZE + BN - 1) // BN
    for i in range(0, (highest // SIZE + 1 - past) * PARTS):
        block = past + i // PARTS
        inside = i % PARTS * BN + tl.arange(0, BN)
        token = block * SIZE + inside
        there = (inside < SIZE) & (token <= highest)
        number = block.to(tl.int64)
        if pages is not None:
            number = tl.load(pages + block).to(tl.int64)
        member = ((bits_of(marks, block, True, BQ).to(tl.int32) >> i_of) & 1) != 0
        seen = there[None, :] & (token[None, :] <= position[:, None]) & member[:, None]
        inside = inside.to(tl.int64)
        peak, mass, total = add_rows(
            peak, mass, total, query, keys, values, number * k_s + inside * k_t, number * v_s + inside * v_t,
            there, seen, factor, D, DP, E, EP, True,
        )  # fmt: skip
    return peak, mass, total


@triton.jit(do_not_specialize=COUNTS)
def band_kernel(
    q, k, v, marks, numbers, members, limits, out, lse, lengths, cu, pages, sparse, q_b, q_t, q_h, k_b, k_t,
    k_h, v_b, v_t, v_h, tokens, length, begin, end, documents, per_row, words, room, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    STEPS: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out `[B, end - begin, Hq, E]` and lse: attention of one tile and kv head over the blocks its queries
    share."""
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
    i_of = row // GP
    t = first + i_of
    there = (g < GROUP) & (t < last) & (t >= begin)
    position = tl.minimum(position0.to(tl.int32) + i_of, highest)
    query = load_rows(q, b * q_b + t * q_t + (h * GROUP + g) * q_h, there, D, DP)
    keys = k + h * k_h
    values = v + h * v_h
    if pages is None:
        keys += b * k_b + start * k_t
        values += b * v_b + start * v_t
        k_s = k_t * SIZE
        v_s = v_t * SIZE
    else:
        pages += n * per_row
        k_s = k_b
        v_s = v_b
    tile = (b * tl.num_programs(0) + index) * HEADS + h
    peak = tl.full((GP * BQ,), float("-inf"), tl.float32)
    mass = tl.zeros((GP * BQ,), tl.float32)
    total = tl.zeros((GP * BQ, EP), tl.float32)
    peak, mass, total = add_shared(
        peak, mass, total, query, keys, values, k_s, k_t, v_s, v_t, numbers + tile * room,
        members + tile * room, tl.load(limits + tile * LIMITS), i_of, factor, SIZE, D, DP, E, EP, BN,
    )  # fmt: skip
    peak, mass, total = add_near(
        peak, mass, total, query, keys, values, k_s, k_t, v_s, v_t, pages, marks + tile * words,
        tl.load(limits + tile * LIMITS + 2), highest, position, i_of, factor, BQ, SIZE, D, DP, E, EP, BN,
    )  # fmt: skip
    place = ((b * (end - begin) + t - begin) * HEADS + h) * GROUP + g
    tl.store(lse + place, peak + tl.log2(mass), mask=there)
    e = tl.arange(0, EP)
    total = total * (1 / tl.where(mass > 0, mass, 1.0))[:, None]
    tl.store(
        out + place[:, None] * E + e[None, :],
        total.to(out.dtype.element_ty),
        mask=there[:, None] & (e < E)[None, :],
    )


def tile_config(
    tokens: int, group: int, dim: int, value_dim: int, itemsize: int, arch: int
) -> dict[str, int]:
    """Tile of a group of heads and neighbouring queries: by compilation, the largest whose sums stay in
    registers on each architecture."""
    wide, deep, heads = padded(dim), padded(value_dim), 1 << (group - 1).bit_length()
    widest = max(wide, deep)
    if itemsize == 4:
        rows = 32 if widest <= 64 else 16
    else:
        rows = 64 if widest > 128 else HALF_ROWS
    if triton_interpreted():
        rows = 256
    queries = max(16 // heads, min(rows // heads, 1 << (tokens - 1).bit_length()), 1)
    return {
        "GP": heads,
        "BQ": queries,
        "DP": wide,
        "EP": deep,
        "BN": 64 if itemsize == 2 and widest <= 128 and arch == 90 else 32,
        "num_warps": 8 if queries * heads > (64 if widest <= 128 else 32) or itemsize == 4 else 4,
        "num_stages": 3 if itemsize == 2 and widest <= 128 else 2,
    }


def band_config(
    tokens: int, group: int, size: int, dim: int, value_dim: int, itemsize: int, arch: int
) -> dict[str, int]:
    """Tile of `band_kernel`: of at most 32 queries, and no step over more keys than one block has."""
    tile = tile_config(tokens, group, dim, value_dim, itemsize, arch)
    return {
        **tile,
        "BQ": min(tile["BQ"], MOST_QUERIES),
        "BN": min(padded(size), 256 if triton_interpreted() else tile["BN"]),
    }


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, shared: Shared, size: int, rows: Rows, factor: float, begin: int,
    out: Tensor, lse: Tensor, config: dict[str, int],
) -> None:  # fmt: skip
    """Fill out `[B, count, Hq, E]` and lse `[B, count, Hq]` (contiguous) of the queries from `begin` on, but
    the rows of sequences that are not sparse."""
    batch, tiles, kv_heads, words = shared.marks.shape
    with on_device(q):
        band_kernel[(tiles, kv_heads, batch)](
            q, k, v, *shared[:4], out, lse, rows.lengths, rows.cu, rows.pages, rows.sparse, *q.stride()[:3],
            *k.stride()[:3], *v.stride()[:3], rows.tokens, rows.length, begin, begin + out.shape[1],
            rows.documents, rows.per_row, words, shared.numbers.shape[3], factor, HEADS=kv_heads,
            GROUP=q.shape[2] // kv_heads, SIZE=size, D=q.shape[3], E=v.shape[3], STEPS=rows.steps, **config,
        )  # fmt: skip


def compile_cases(arch: int) -> CompileCases:
    """All sizes; the first with lengths on the device, the others with packed documents; half precision with
    pages too."""
    kinds = {
        **dict.fromkeys(("begin", "end", "documents", "words", "room"), "i32"),
        **dict.fromkeys(("marks", "numbers", "members", "limits"), "*i32"),
    }
    for name, dtype, group, size, dim in SIZES:
        config = band_config(4096, group, size, dim, dim, 4 if dtype == "fp32" else 2, arch)
        options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
        common = {"HEADS": 2, "GROUP": group, "SIZE": size, "D": dim, "E": dim, "STEPS": 4}
        absent = ("cu" if not name else "lengths", "pages", "sparse")
        for missing in (absent, ()) if dtype == "bf16" else (absent,):
            constants = {**common, **config, **dict.fromkeys(missing)}
            types = case_types(band_kernel, dtype, constants, **kinds)
            title = f"band_kernel{name}{' pages' * (not missing)}"
            yield CompileCase(title, band_kernel, types, constants, options)
