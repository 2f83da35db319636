# mypy: allow-untyped-defs
"""Block lists turned around: for each key block the queries that chose it, made on the device with shapes
known beforehand.

A pair is one entry of `blocks [B, T, Hkv, K]` (T queries from `begin` on), numbered as it lies in memory. A
bin is one block of one kv head and row (or one slot of packed documents, see `triton_rows`, or one page).
Pairs are sorted by bin, stably, so that the queries of a bin ascend and sums over them always run in the same
order. Bins are cut into segments of at most SEG pairs, the unit of work of a program; since nobody on the
host knows how full the bins are, there are as many segments as there could be, and some stay empty.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, find_document, on_device
from .triton_rows import COUNTS, Rows, locate
from .triton_shared import Shared, is_shared

KEYED = 1024  # pairs that a program gives their bin


class Index(NamedTuple):
    """Pairs by bin, and segments of the bins."""

    order: Tensor  # [P] pairs, those of bin 0 first; pairs in no bin last
    bounds: Tensor  # [bins + 1] where the pairs of each bin begin in `order`
    firsts: Tensor  # [bins + 1] the first segment of each bin
    bin_of: Tensor  # [segments] the bin of each segment, `bins` for empty ones
    bins: int
    slots: int  # bins of one kv head
    length: int  # pairs of a segment at most


@triton.jit(do_not_specialize=COUNTS)
def bin_kernel(
    blocks, key, marks, limits, lengths, cu, number, pages, sparse, tokens, length, begin, count, origin,
    tiles, words, slots, none, per_row, HEADS: tl.constexpr, LIST: tl.constexpr, SIZE: tl.constexpr,
    BQ: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The bin of each pair; `none` for entries without a block, wholly in the future of their query, or, with
    `marks`, of a block that the tile of the query shares (`Shared`)."""
    b = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    t = pair // (LIST * HEADS)
    h = pair // LIST % HEADS
    there = t < count
    pair += b * count * (LIST * HEADS)
    block = tl.load(blocks + pair, mask=there, other=-1).to(tl.int32)
    t = tl.where(there, begin + t, begin)
    position, start = locate(lengths, length, cu, number, b, t, tokens)
    if pages is not None:
        n = tl.load(number + t)
        position = (t + tl.load(lengths + n) - tl.load(cu + n + 1)).to(tl.int32)
    chosen = (block >= 0) & (block * SIZE <= position)
    if pages is not None:  # in rows of dense sequences a number may be anything
        chosen = chosen & (tl.load(sparse + n) != 0)
    if pages is not None:
        slot = tl.load(pages + n.to(tl.int64) * per_row + block, mask=chosen, other=0)
    elif cu is not None:
        n = tl.load(number + t)
        slot = block + start // SIZE + n
    else:
        slot = block + t * 0
    if marks is not None:
        if cu is not None:
            tile = start // BQ + n + (t - start) // BQ - tl.maximum(origin // BQ - 1, 0)
        else:
            tile = (t - origin) // BQ
        row = (b * tiles + tile) * HEADS + h
        chosen = chosen & (is_shared(marks, limits, row, block, chosen, words, BQ) == 0)
    tl.store(key + pair, tl.where(chosen, (b * HEADS + h) * slots + slot, none).to(tl.int32), mask=there)


def invert(
    blocks: Tensor,
    size: int,
    rows: Rows,
    segment: int,
    begin: int = 0,
    shared: Shared | None = None,
) -> Index:
    """The index of `blocks [B, T, Hkv, K]` (contiguous) of queries from `begin` on, in segments of at most
    `segment` pairs.

    Blocks that the tile of a query shares, if given, are left out.
    """
    (batch, count, heads, chosen), device = blocks.shape, blocks.device
    slots, pairs = rows.slots(size), blocks.numel()
    bins = batch * heads * slots
    key = torch.empty(pairs, dtype=torch.int32, device=device)
    with on_device(blocks):
        bin_kernel[(cdiv(pairs // batch, KEYED), batch)](
            blocks, key, None if shared is None else shared.marks, None if shared is None else shared.limits,
            rows.lengths, rows.cu, rows.number, rows.pages, rows.sparse, rows.tokens, rows.length, begin,
            count, *((0, 1, 1) if shared is None else (shared.origin, *shared.marks.shape[1::2])), slots,
            bins, rows.per_row, HEADS=heads, LIST=chosen, SIZE=size,
            BQ=1 if shared is None else shared.queries, N=KEYED, num_warps=4,
        )  # fmt: skip
    key, order = torch.sort(key, stable=True)
    bounds = torch.searchsorted(key, torch.arange(bins + 1, dtype=torch.int32, device=device))
    needed = (bounds.diff() + (segment - 1)) // segment
    firsts = torch.nn.functional.pad(needed.cumsum(0), (1, 0))
    most = pairs // segment + bins
    bin_of = torch.searchsorted(firsts, torch.arange(most, device=device), right=True) - 1
    return Index(order, bounds, firsts, bin_of, bins, slots, segment)


@triton.jit
def segment_of(bin_of, bounds, firsts, bins, LENGTH: tl.constexpr):
    """This program's bin (`bins` if it has none), and which of the sorted pairs are its segment."""
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(bin_of + program).to(tl.int32)
    safe = tl.minimum(number, bins - 1)
    first = tl.load(bounds + safe) + (program - tl.load(firsts + safe)) * LENGTH
    return number, first, tl.minimum(first + LENGTH, tl.load(bounds + safe + 1))


@triton.jit
def place_of(mine, slots, HEADS: tl.constexpr):
    """Slot, kv head and row of a bin."""
    head = mine // slots
    return (mine - head * slots).to(tl.int64), (head % HEADS).to(tl.int64), (head // HEADS).to(tl.int64)


@triton.jit
def block_of(slot, b, lengths, length, cu, documents, tokens, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """What a slot stands for: block of its sequence, where that begins in storage, its keys, position of
    query 0."""
    if cu is not None:
        n, block = find_document(cu, slot, documents, SIZE, STEPS)
        start = tl.load(cu + n).to(tl.int64)
        return block, start, tl.load(cu + n + 1).to(tl.int64) - start, -start
    if lengths is not None:
        keys = tl.load(lengths + b).to(tl.int64)
    else:
        keys = slot * 0 + length
    return slot, slot * 0, keys, keys - tokens


def compile_cases(arch: int) -> CompileCases:
    """Batches with lengths on the device, and packed documents and pages of which tiles share blocks."""
    counts = ("tokens", "length", "begin", "count", "origin", "tiles", "words", "slots", "none", "per_row")
    pointers = ("blocks", "key", "marks", "limits", "lengths", "cu", "number", "pages", "sparse")
    for name, absent in (
        ("batch", ("cu", "number", "marks", "limits", "pages", "sparse")),
        ("packed", ("lengths", "pages", "sparse")),
        ("pages", ()),
    ):
        types = {**dict.fromkeys(counts, "i32"), **{n: "*i32" for n in pointers if n not in absent}}
        constants = {"HEADS": 2, "LIST": 96, "SIZE": 64, "BQ": 8, "N": KEYED, **dict.fromkeys(absent)}
        yield CompileCase(f"bin_kernel {name}", bin_kernel, types, constants, {"num_warps": 4})
