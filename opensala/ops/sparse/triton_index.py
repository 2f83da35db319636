# mypy: allow-untyped-defs
"""Block lists turned around: for each key block the queries that chose it, made on the device with shapes known beforehand.

A pair is one entry of `blocks [B, T, Hkv, K]`, numbered as it lies in memory. A bin is one block of one kv head and row (or
one slot of packed documents, see `triton_rows`). Pairs are sorted by bin, stably, so that the queries of a bin ascend and
sums over them always run in the same order. Bins are cut into segments of at most SEG pairs, the unit of work of a program;
since nobody on the host knows how full the bins are, there are as many segments as there could be, and some stay empty.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, on_device
from .triton_rows import Rows, locate

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


@triton.jit
def bin_kernel(
    blocks, bins, lengths, cu, number, tokens, length, slots, none,
    HEADS: tl.constexpr, LIST: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The bin of each pair; `none` for entries without a block or wholly in the future of their query."""
    b = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    t = pair // (LIST * HEADS)
    h = pair // LIST % HEADS
    there = t < tokens
    pair += b * tokens * (LIST * HEADS)
    block = tl.load(blocks + pair, mask=there, other=-1).to(tl.int32)
    t = tl.where(there, t, 0)
    position, start = locate(lengths, length, cu, number, b, t, tokens)
    if cu is not None:
        slot = block + start // SIZE + tl.load(number + t)
    else:
        slot = block + t * 0
    chosen = (block >= 0) & (block * SIZE <= position)
    tl.store(bins + pair, tl.where(chosen, (b * HEADS + h) * slots + slot, none).to(tl.int32), mask=there)


def invert(blocks: Tensor, size: int, rows: Rows, segment: int) -> Index:
    """The index of `blocks [B, T, Hkv, K]` (contiguous) with segments of at most `segment` pairs."""
    (batch, tokens, heads, chosen), device = blocks.shape, blocks.device
    slots, pairs = rows.slots(size), blocks.numel()
    bins = batch * heads * slots
    key = torch.empty(pairs, dtype=torch.int32, device=device)
    with on_device(blocks):
        bin_kernel[(cdiv(pairs // batch, KEYED), batch)](
            blocks, key, rows.lengths, rows.cu, rows.number, tokens, rows.length, slots, bins, HEADS=heads, LIST=chosen, SIZE=size,
            N=KEYED, num_warps=4,
        )  # fmt: skip
    key, order = torch.sort(key, stable=True)
    bounds = torch.searchsorted(key, torch.arange(bins + 1, dtype=torch.int32, device=device))
    count = (bounds.diff() + (segment - 1)) // segment
    firsts = torch.nn.functional.pad(count.cumsum(0), (1, 0))
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


def compile_cases(arch: int) -> CompileCases:
    """Batches with lengths on the device, and packed documents."""
    for name, absent in (("batch", ("cu", "number")), ("packed", ("lengths",))):
        types = {"blocks": "*i32", "bins": "*i32", "lengths": "*i32", "cu": "*i32", "number": "*i32", "tokens": "i32", "length": "i32",
                 "slots": "i32", "none": "i32"}
        constants = {"HEADS": 2, "LIST": 96, "SIZE": 64, "N": KEYED, **dict.fromkeys(absent)}
        yield CompileCase(f"bin_kernel {name}", bin_kernel, {n: t for n, t in types.items() if n not in absent}, constants,
                          {"num_warps": 4})
