# mypy: allow-untyped-defs
"""Which blocks the queries of a tile share, found on the device: what `band_kernel` attends for all of them
at once.

Neighbouring queries choose mostly the same blocks. A tile's shared blocks are those that at least half of its
queries list; rows of the others are masked. They are taken among the blocks wholly in the past of all its
queries; the one or two behind these, in which the tile itself lies, it takes whoever lists them. So whatever
remains, a pair of a query and a block that is not shared, needs no causal mask.

1. `mark_kernel` enters the lists of a tile in a table of bits: bit block * BQ + i says that query i lists the
   block. Bits are set by atomic or, whose order does not matter.
2. `share_kernel` counts them for each block and writes down the shared ones, ascending.

Shapes: B rows, T queries, K blocks of a list, BQ queries of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, on_device
from .triton_rows import COUNTS, Rows, tile_of

WORD = tl.constexpr(32)  # bits
MOST_QUERIES = 32  # of a tile: the bits of a block lie in one word
PORTION = 2  # a block is shared that one in so many queries of a tile lists
COUNTED = 1024  # blocks that a program counts at once
LIMITS = tl.constexpr(3)  # numbers in `Shared.limits`


class Shared(NamedTuple):
    """The shared blocks of each tile and kv head."""

    marks: Tensor  # [B, tiles, Hkv, words] bits: which of its queries list a block
    numbers: Tensor  # [B, tiles, Hkv, room] the shared blocks, or the pages they are
    members: Tensor  # [B, tiles, Hkv, room] bits: the queries that list them
    limits: (
        Tensor  # [B, tiles, Hkv, 3]: shared blocks; queries that make one shared; blocks in the past of all
    )
    queries: int  # of a tile
    origin: int  # the query with which the tiles begin


@triton.jit
def bits_of(marks, block, there, BQ: tl.constexpr):
    """The queries of a tile that list a block, as bits: from the tile's row of the table."""
    bit = block * BQ
    word = tl.load(marks + bit // WORD, mask=there, other=0).to(tl.uint32, bitcast=True)
    if BQ == WORD:
        return word
    return (word >> (bit % WORD).to(tl.uint32)) & ((1 << BQ) - 1)


@triton.jit
def bits_in(x):
    """How many of the 32 bits are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=COUNTS)
def mark_kernel(
    blocks, marks, lengths, cu, sparse, tokens, length, begin, end, documents, words, HEADS: tl.constexpr,
    LIST: tl.constexpr, LIST_P: tl.constexpr, SIZE: tl.constexpr, BQ: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Set the bits of one tile and kv head in `marks`, which are zero before."""
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
    position = position0.to(tl.int32) + tl.arange(0, BQ)
    chosen = (block >= 0) & (block * SIZE <= position[:, None])
    bit = tl.where(chosen, block, 0) * BQ + tl.arange(0, BQ)[:, None]
    one = tl.full((BQ, LIST_P), 1, tl.int32)
    row = ((b * tl.num_programs(0) + index) * HEADS + h) * words
    tl.atomic_or(marks + row + bit // WORD, one << (bit % WORD), mask=chosen, sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def share_kernel(
    marks, numbers, members, limits, lengths, cu, pages, sparse, tokens, length, begin, end, documents,
    per_row, words, room, HEADS: tl.constexpr, SIZE: tl.constexpr, BQ: tl.constexpr, STEPS: tl.constexpr,
    PORTION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The shared blocks of one tile and kv head: see `Shared`."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    index = tl.program_id(0).to(tl.int64)
    first, last, position0, n, _ = tile_of(
        lengths, length, cu, documents, index, b, tokens, begin, end, BQ, STEPS, sparse
    )
    row = (b * tl.num_programs(0) + index) * HEADS + h
    count = tl.maximum(last - tl.maximum(first, begin), 0).to(tl.int32)
    enough = tl.maximum((count + PORTION - 1) // PORTION, 1)
    past = tl.where(count > 0, (position0.to(tl.int32) + 1) // SIZE, 0)
    taken = past * 0
    for piece in range(0, past, C):
        block = piece + tl.arange(0, C)
        inside = block < past
        mine = bits_of(marks + row * words, block, inside, BQ)
        chosen = inside & (bits_in(mine) >= enough)
        place = row * room + taken + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        if pages is None:
            number = block
        else:
            number = tl.load(pages + n * per_row + block, mask=chosen, other=0).to(tl.int32)
        tl.store(numbers + place, number, mask=chosen)
        tl.store(members + place, mine.to(tl.int32, bitcast=True), mask=chosen)
        taken += tl.sum(chosen.to(tl.int32), axis=0)
    tl.store(limits + row * LIMITS, taken)
    tl.store(limits + row * LIMITS + 1, enough)
    tl.store(limits + row * LIMITS + 2, past)


@triton.jit
def is_shared(marks, limits, row, block, there, words, BQ: tl.constexpr):
    """Whether the tile in row `row` of the tables attends a block that one of its queries lists."""
    enough = tl.load(limits + row * LIMITS + 1, mask=there, other=0)
    past = tl.load(limits + row * LIMITS + 2, mask=there, other=0)
    mine = bits_of(marks + row * words, block, there, BQ)
    return (block >= past) | (bits_in(mine) >= enough)


def blocks_of(rows: Rows, size: int) -> int:
    """Blocks that a sequence may have."""
    return cdiv(rows.capacity, size) if rows.pages is None else rows.per_row


def share(blocks: Tensor, size: int, rows: Rows, begin: int, queries: int) -> Shared:
    """What tiles of `queries` queries share of blocks `[B, count, Hkv, K]`, the lists of those from `begin`
    on."""
    (batch, count, heads, chosen), device = blocks.shape, blocks.device
    end = begin + count
    most = blocks_of(rows, size)
    words, room, tiles = (
        cdiv(most * queries, 32),
        min(PORTION * chosen, most),
        rows.tiles(queries, begin, end),
    )
    marks, numbers, members, limits = (
        torch.empty(batch, tiles, heads, n, dtype=torch.int32, device=device) for n in (words, room, room, 3)
    )
    marks.zero_()
    common = {"HEADS": heads, "SIZE": size, "BQ": queries, "STEPS": rows.steps, "num_warps": 4}
    with on_device(blocks):
        mark_kernel[(tiles, heads, batch)](
            blocks, marks, rows.lengths, rows.cu, rows.sparse, rows.tokens, rows.length, begin, end,
            rows.documents, words, LIST=chosen, LIST_P=1 << (chosen - 1).bit_length(), **common,
        )  # fmt: skip
        share_kernel[(tiles, heads, batch)](
            marks, numbers, members, limits, rows.lengths, rows.cu, rows.pages, rows.sparse, rows.tokens,
            rows.length, begin, end, rows.documents, rows.per_row, words, room,
            PORTION=PORTION, C=min(COUNTED, 1 << (most - 1).bit_length()), **common,
        )  # fmt: skip
    return Shared(marks, numbers, members, limits, queries, begin)


def compile_cases(arch: int) -> CompileCases:
    """Packed documents, pages, and rows of equal length, at the released sizes."""
    integers = ("tokens", "length", "begin", "end", "documents", "words", "per_row", "room")
    pointers = ("blocks", "marks", "numbers", "members", "limits", "lengths", "cu", "pages", "sparse")
    for name, absent in (
        ("packed", ("lengths", "pages", "sparse")),
        ("pages", ()),
        ("batch", ("cu", "pages", "sparse", "lengths")),
    ):
        for kernel, more in (
            (mark_kernel, {"LIST": 96, "LIST_P": 128}),
            (share_kernel, {"PORTION": PORTION, "C": COUNTED}),
        ):
            constants = {"HEADS": 2, "SIZE": 64, "BQ": 8, "STEPS": 4, **more, **dict.fromkeys(absent)}
            constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
            types = {**dict.fromkeys(integers, "i32"), **dict.fromkeys(pointers, "*i32")}
            types = {n: x for n, x in types.items() if n in kernel.arg_names and n not in constants}
            yield CompileCase(f"{kernel.__name__} {name}", kernel, types, constants, {"num_warps": 4})
