# mypy: allow-untyped-defs
"""The best blocks of each query from their scores, in Triton, without sorting.

The k-th largest score is found by bisection over the bits of the scores (non-negative floats order as their
bits do), which stops as soon as a bound leaves exactly k above it; a running count of the chosen then gives
every chosen block its place, so numbers come out ascending, and among equal scores at the edge the lower ones
are taken (`ties` has the reference's rule). It works for any k, holds a row of scores in registers (longer
rows are read again in every step), and its result does not depend on tiles.

Shapes: B rows, T queries, Hkv kv heads, N blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, find_sequence, on_device
from .spec import BlockSpec
from .ties import settle, ties_are_exact
from .triton_rows import COUNTS, Rows, locate

WIDEST = 1 << 14  # scores of a row that a program holds in registers: 1M tokens at the released sizes
ELEMENTS = 1 << 10  # scores of several rows that a program holds
INFINITE = tl.constexpr(0x7F800000)  # the bits of +inf: forced blocks


@triton.jit
def keys_of(
    scores,
    here,
    own,
    first,
    width,
    INIT: tl.constexpr,
    WINDOW: tl.constexpr,
    KEEP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Sortable keys `[R, C]` of blocks first ... first + C - 1: +inf if forced, -1 without a visible window,
    -2 if not there."""
    block = first + tl.arange(0, C)
    mine = block[None, :] <= own[:, None]
    forced = (block < INIT)[None, :] | (own[:, None] - block[None, :] <= WINDOW)
    wanted = mine & (forced == 0) & (own >= KEEP)[:, None] & here[:, None]
    score = tl.load(scores + (tl.arange(0, R) * width)[:, None] + block[None, :], mask=wanted, other=0.0)
    bits = tl.minimum(score, 3e38).to(tl.int32, bitcast=True)  # an overflow stays below the forced ones
    key = tl.where(bits < 0, -1, bits)
    return tl.where(mine, tl.where(forced, INFINITE, key), -2)


@triton.jit(do_not_specialize=COUNTS)
def top_kernel(
    scores, out, ties, lengths, cu, number, sparse, tokens, length, begin, end, width, count, documents,
    HEADS: tl.constexpr, SIZE: tl.constexpr, INIT: tl.constexpr, WINDOW: tl.constexpr, KEEP: tl.constexpr,
    STEPS: tl.constexpr, KEEP_P: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out `[B, end - begin, Hkv, KEEP]` from scores `[B, end - begin, Hkv, width]` of queries begin ... end -
    1, R rows a program.

    With WHOLE, C columns hold a whole row; else rows are walked in pieces of C. With pages, rows of sequences
    that are not `sparse` are -1: as if they had no block. Where equal scores straddle the edge of the choice
    the lower blocks are taken; `ties` `[B, end - begin, Hkv]`, if given, is then the number of blocks of the
    query, else 0.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    here = row < count
    scores += tl.program_id(0).to(tl.int64) * R * width  # offsets from here on are small: 32 bits hold them
    out += tl.program_id(0).to(tl.int64) * R * KEEP
    b = row // ((end - begin) * HEADS)
    t = begin + row // HEADS % (end - begin)
    t = tl.where(here, t, begin)
    if sparse is None:
        own, _ = locate(lengths, length, cu, number, tl.where(here, b, 0), t, tokens)
        own = tl.where(here, own // SIZE, 0)
    else:
        n = find_sequence(cu, t, documents, STEPS)
        own = (t + tl.load(lengths + n) - tl.load(cu + n + 1)) // SIZE
        own = tl.where(here, tl.where(tl.load(sparse + n) != 0, own, -1), 0)
    pieces = 1 if WHOLE else tl.cdiv(tl.max(own, axis=0) + 1, C)
    key = keys_of(scores, here, own, 0, width, INIT, WINDOW, KEEP, R, C)

    # The largest `low` such that at least KEEP keys reach it lies in [low, high); high has fewer than KEEP.
    low = tl.full((R,), -1, tl.int32)
    high = tl.full((R,), INFINITE + 1, tl.int32)
    open_ = (own >= KEEP).to(tl.int32)
    while tl.max(open_, axis=0) > 0:
        middle = low + (high - low) // 2
        reached = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1)
        for piece in range(1, pieces):
            other = keys_of(scores, here, own, piece * C, width, INIT, WINDOW, KEEP, R, C)
            reached += tl.sum((other >= middle[:, None]).to(tl.int32), axis=1)
        enough = (reached >= KEEP) & (open_ > 0)
        low = tl.where(enough, middle, low)
        high = tl.where((reached < KEEP) & (open_ > 0), middle, high)
        open_ = tl.where((reached == KEEP) | (high - low <= 1), 0, open_)

    above = tl.sum((key >= high[:, None]).to(tl.int32), axis=1)
    for piece in range(1, pieces):
        other = keys_of(scores, here, own, piece * C, width, INIT, WINDOW, KEEP, R, C)
        above += tl.sum((other >= high[:, None]).to(tl.int32), axis=1)
    target = out + (tl.arange(0, R) * KEEP)[:, None]
    place = tl.arange(0, KEEP_P)
    tl.store(
        target + place[None, :],
        tl.full((R, KEEP_P), -1, tl.int32),
        mask=(here[:, None] & (place[None, :] > own[:, None]) & (place < KEEP)[None, :]),
    )
    taken = tl.zeros((R,), tl.int32)  # chosen above the edge so far
    tied = tl.zeros((R,), tl.int32)  # at the edge so far, chosen or not; no more than matter
    room = KEEP - above
    for piece in range(0, pieces):
        if not WHOLE:
            key = keys_of(scores, here, own, piece * C, width, INIT, WINDOW, KEEP, R, C)
        over = key >= high[:, None]
        edge = (key >= low[:, None]) & (key < high[:, None])
        # Both running counts in one: those at the edge, at most KEEP + 1 + C, in the lower 16 bits.
        counts = (
            tl.cumsum(tl.where(over, 1 << 16, tl.where(edge, 1, 0)), axis=1)
            + (taken * (1 << 16) + tied)[:, None]
        )
        edges = counts & 0xFFFF
        place_of = (counts >> 16) + tl.minimum(edges, room[:, None]) - 1
        chosen = here[:, None] & (over | (edge & (edges <= room[:, None]))) & (place_of < KEEP)
        block = piece * C + tl.arange(0, C)
        tl.store(target + place_of, tl.broadcast_to(block[None, :], (R, C)), mask=chosen)
        most = tl.max(counts, axis=1)
        taken = most >> 16
        tied = tl.minimum(most & 0xFFFF, KEEP + 1)
    if ties is not None:
        tl.store(ties + row, tl.where((own >= KEEP) & (tied > room), own + 1, 0), mask=here)


def top_config(width: int, keep: int) -> dict[str, int]:
    columns = min(max(16, 1 << (width - 1).bit_length()), WIDEST)
    rows = max(1, ELEMENTS // columns)
    warps = min(32, max(4, columns * rows // 512))
    return {
        "R": rows,
        "C": columns,
        "WHOLE": int(columns >= width),
        "KEEP_P": 1 << (keep - 1).bit_length(),
        "num_warps": warps,
    }


def top_blocks(scores: Tensor, out: Tensor, spec: BlockSpec, rows: Rows, begin: int, end: int) -> None:
    """Fill out[:, begin:end] from scores `[B, end - begin, Hkv, width]`."""
    heads, width = scores.shape[2:]
    part = out[:, begin:end]
    target = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
    count = scores.shape[0] * (end - begin) * heads
    config = top_config(width, spec.num_blocks)
    ties = torch.empty(count, dtype=torch.int32, device=scores.device) if ties_are_exact() else None
    with on_device(scores):
        top_kernel[(cdiv(count, config["R"]),)](
            scores, target, ties, rows.lengths, rows.cu, rows.number, rows.sparse, rows.tokens, rows.length,
            begin, end, width, count, rows.documents, HEADS=heads, SIZE=spec.block_size,
            INIT=spec.init_blocks, WINDOW=spec.window_blocks, KEEP=spec.num_blocks, STEPS=rows.steps,
            **config,
        )  # fmt: skip
    if ties is not None:
        settle(scores.view(count, width), target.view(count, -1), ties, spec)
    if target is not part:
        part.copy_(target)


def compile_cases(arch: int) -> CompileCases:
    """Rows of 16K, 512K, 1M and 2M tokens; the last are more than registers hold."""
    spec = BlockSpec()
    for width, paged in (
        (1 << 8, False),
        (1 << 13, False),
        (1 << 14, False),
        (1 << 15, False),
        (1 << 8, True),
        (1 << 14, True),
    ):
        config = top_config(width, spec.num_blocks)
        options = {"num_warps": config.pop("num_warps")}
        counts = ("tokens", "length", "begin", "end", "width", "count", "documents")
        tables = ("lengths", "cu", "sparse") if paged else ()
        types = {
            "scores": "*fp32",
            "out": "*i32",
            **dict.fromkeys(("ties",) * (width == 1 << 8), "*i32"),
            **dict.fromkeys(tables, "*i32"),
            **dict.fromkeys(counts, "i32"),
        }
        constants = {
            **dict.fromkeys({"lengths", "cu", "number", "sparse"} - set(tables)),
            **dict.fromkeys(("ties",) * (width != 1 << 8)),
            "HEADS": 2,
            "SIZE": spec.block_size,
            "INIT": spec.init_blocks,
            "WINDOW": spec.window_blocks,
            "KEEP": spec.num_blocks,
            "STEPS": 4,
            **config,
        }
        name = f"top_kernel {width}{' pages' * paged}"
        yield CompileCase(name, top_kernel, types, constants, options)
