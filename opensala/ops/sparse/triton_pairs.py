# mypy: allow-untyped-defs
"""Block-sparse attention in Triton, block by block: the forward pass of long calls.

Walking the list of one query moves a block's keys and values (32 KB at the released sizes) through the L2
cache for 16 rows of a product, far too little work for the bytes: 1.6 TB a layer at 256K tokens. So the work
is turned around:

1. Blocks that most queries of a tile list, above all those of the local window, are attended by the tile
   (`triton_shared`, `triton_band`), and what comes out is the beginning of the result.
2. The other (query, block) pairs are sorted by block (`triton_index`); `pair_kernel` loads a block once and
   attends with all queries that chose it. Each pair leaves a partial result of its own, normalised, in the
   dtype of the queries.
3. `merge_kernel` joins the partial results of each query by their log-sum-exp.

The partial results take 1/8 of the bytes of 32 KB a pair, written and read once. Queries go through in chunks
whose partial results fit PART_BYTES, and in stretches of chunks whose tables of shared blocks fit MARK_BYTES;
sums run in an order that does not depend on timing.

Shapes: B rows, T queries, K blocks of a list, G query heads a kv head, D/E key/value dim, S keys of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, arch_of, on_device, padded
from .triton_attend import SIZES, case_types, merge
from .triton_band import attend_shared, band_config
from .triton_index import block_of, invert, place_of, segment_of
from .triton_rows import COUNTS, Rows, load_rows
from .triton_shared import Shared, blocks_of, share

PART_BYTES = 1 << 30  # of partial results at once
MARK_BYTES = 1 << 26  # of the tables that say which queries list which block
SEGMENT = 64  # pairs of a block that one program attends
LEAST_QUERIES = 128  # below, or with less than SHARED pairs a block, queries go one by one
SHARED = 2
WIDEST_BLOCK = 128
BLOCK_BYTES = 64 * 1024  # of keys and values of one block: what a program holds without spilling


@triton.jit(do_not_specialize=COUNTS)
def pair_kernel(
    q, k, v, parts, part_lse, order, bounds, firsts, bin_of, lengths, cu, pages, q_b, q_t, q_h, k_b, k_t,
    k_h, v_b, v_t, v_h, tokens, length, begin, count, documents, slots, bins, factor, HEADS: tl.constexpr,
    GROUP: tl.constexpr, LIST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    LENGTH: tl.constexpr, STEPS: tl.constexpr, GP: tl.constexpr, PQ: tl.constexpr, DP: tl.constexpr,
    EP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """parts `[B, count, Hkv, LIST, G, E]` and part_lse: a block against a segment of the queries that chose
    it, in the past of all of which it lies."""
    mine, first_pair, last_pair = segment_of(bin_of, bounds, firsts, bins, LENGTH)
    if mine >= bins:
        return
    slot, h, b = place_of(mine, slots, HEADS)
    inside = tl.arange(0, SP)
    if pages is None:
        block, start, _, _ = block_of(slot, b, lengths, length, cu, documents, tokens, SIZE, STEPS)
        k += b * k_b + (start + block * SIZE) * k_t
        v += b * v_b + (start + block * SIZE) * v_t
    else:  # the bin is a page
        k += slot * k_b
        v += slot * v_b
    q += b * q_b + h * GROUP * q_h
    there = inside < SIZE
    x = load_rows(k, h * k_h + inside.to(tl.int64) * k_t, there, D, DP).to(q.dtype.element_ty)
    y = load_rows(v, h * v_h + inside.to(tl.int64) * v_t, there, E, EP).to(q.dtype.element_ty)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    e = tl.arange(0, EP)
    q_cells = g.to(tl.int64)[:, None] * q_h + d[None, :]  # heads may be far apart
    out_cells = g[:, None] * E + e[None, :]
    origin = begin - b.to(tl.int32) * count
    for i in range(first_pair, last_pair, PQ):
        # What concerns a pair is worked out once, in 32 bits, and the rows of its heads lie at fixed
        # distances from there.
        ranks = i + tl.arange(0, PQ)
        pair = tl.load(order + ranks, mask=ranks < last_pair, other=0).to(tl.int32)
        used = (ranks < last_pair)[:, None] & (g < GROUP)[None, :]
        t = origin + pair // (HEADS * LIST)
        query = tl.load(
            q + (t.to(tl.int64) * q_t)[:, None, None] + q_cells[None, :, :],
            mask=used[:, :, None] & (d < D)[None, None, :],
            other=0.0,
        )
        s = tl.dot(tl.reshape(query, (PQ * GP, DP)), tl.trans(x), input_precision="ieee")
        if SIZE < SP:
            s = tl.where(there[None, :], s, float("-inf"))
        peak = tl.max(s, axis=1) * factor
        p = tl.exp2(s * factor - peak[:, None])
        mass = tl.sum(p, axis=1)
        p = p * (1 / mass)[:, None]
        result = tl.dot(p.to(y.dtype), y, input_precision="ieee")
        place = pair.to(tl.int64) * GROUP
        tl.store(
            part_lse + place[:, None] + g[None, :], tl.reshape(peak + tl.log2(mass), (PQ, GP)), mask=used
        )
        tl.store(
            parts + (place * E)[:, None, None] + out_cells[None, :, :],
            tl.reshape(result.to(parts.dtype.element_ty), (PQ, GP, EP)),
            mask=used[:, :, None] & (e < E)[None, None, :],
        )


def pair_config(group: int, size: int, dim: int, value_dim: int, itemsize: int, arch: int) -> dict[str, Any]:
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
    return (
        tokens - rows.documents * (rows.pages is not None) >= LEAST_QUERIES
        and pairs >= SHARED * blocks_of(rows, size)
        and block_fits(q.shape[3], width, size, q.element_size())
    )


def block_fits(dim: int, value_dim: int, size: int, itemsize: int) -> bool:
    return size <= WIDEST_BLOCK and padded(size) * (padded(dim) + padded(value_dim)) * itemsize <= BLOCK_BYTES


def chunk_of(q: Tensor, blocks: Tensor, width: int) -> int:
    """Queries whose partial results fit PART_BYTES, a multiple of 64 of them."""
    bytes_of_one = q.shape[2] * blocks.shape[3] * (width * q.element_size() + 4)
    return max(64, PART_BYTES // bytes_of_one // 64 * 64)


def stretch_of(blocks: Tensor, size: int, rows: Rows) -> int:
    """Queries whose marks fit MARK_BYTES, likewise."""
    bits_of_one = blocks.shape[2] * blocks_of(rows, size)
    return max(64, MARK_BYTES * 8 // bits_of_one // 64 * 64)


def attend_by_block(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows, factor: float
) -> tuple[Tensor, Tensor]:
    """out `[B, T, Hq, E]` in q's dtype and lse `[B, T, Hq]` in base 2; every head of q, k, v contiguous."""
    (batch, tokens, heads, _), width = q.shape, v.shape[3]
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=q.device)
    # The results of a chunk lie side by side for one row, or for whole rows.
    fits = min(chunk_of(q, blocks, width), stretch_of(blocks, size, rows))
    together = batch if batch * tokens <= fits else 1
    for row in range(0, batch, together):
        a = slice(row, row + together)
        mine = rows._replace(lengths=None if rows.lengths is None else rows.lengths[a])
        attend_rows(q[a], k[a], v[a], blocks[a], size, mine, factor, out[a], lse[a])
    return out, lse


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows, factor: float, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Fill out and lse `[B, T, Hq, ...]` from blocks `[B, T, Hkv, K]`; B is 1 where T passes a chunk.

    With pages, k and v are `[pages, S, Hkv, D]`; queries of sequences that are not sparse get zeros.
    """
    (_, tokens, kv_heads, _), (heads, dim), width = blocks.shape, q.shape[2:], v.shape[3]
    shape = (heads // kv_heads, size, dim, width, q.element_size(), arch_of(q.device))
    config = band_config(rows.together, *shape)
    lse.fill_(float("-inf"))
    stretch, chunk = stretch_of(blocks, size, rows), chunk_of(q, blocks, width)
    for origin in range(0, tokens, stretch):
        end = min(origin + stretch, tokens)
        part = slice(origin, end)
        shared = share(blocks[:, part].contiguous(), size, rows, origin, config["BQ"])
        attend_shared(q, k, v, shared, size, rows, factor, origin, out[:, part], lse[:, part], config)
        for begin in range(origin, end, chunk):
            part = slice(begin, min(begin + chunk, end))
            attend_pairs(
                q, k, v, blocks[:, part], size, rows, factor, begin, shared, out[:, part], lse[:, part]
            )


def attend_pairs(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows, factor: float, begin: int,
    shared: Shared, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Add to out and lse `[B, count, Hq, ...]` what the queries from `begin` on find in the blocks
    `[B, count, Hkv, K]` that their tiles do not share."""
    (batch, count, kv_heads, chosen), (heads, dim), width = blocks.shape, q.shape[2:], v.shape[3]
    group = heads // kv_heads
    parts = torch.empty(batch, count, kv_heads, chosen, group, width, dtype=q.dtype, device=q.device)
    part_lse = torch.full(parts.shape[:-1], float("-inf"), dtype=torch.float32, device=q.device)
    index = invert(blocks, size, rows, SEGMENT, begin, shared)
    config = pair_config(group, size, dim, width, q.element_size(), arch_of(q.device))
    with on_device(q):
        pair_kernel[(index.bin_of.numel(),)](
            q, k, v, parts, part_lse, index.order, index.bounds, index.firsts, index.bin_of, rows.lengths,
            rows.cu, rows.pages, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], rows.tokens, rows.length,
            begin, count, rows.documents, index.slots, index.bins, factor, HEADS=kv_heads, GROUP=group,
            LIST=chosen, SIZE=size, D=dim, E=width, LENGTH=index.length, STEPS=rows.steps, **config,
        )  # fmt: skip
    merge(parts, part_lse, out, lse, chosen, chosen * group, group, group, more=True)


def compile_cases(arch: int) -> CompileCases:
    """All sizes; the first with lengths on the device, the others with packed documents; half precision with
    pages too."""
    kinds = {
        **dict.fromkeys(("begin", "count", "documents", "slots", "bins"), "i32"),
        **dict.fromkeys(("order", "bounds", "firsts", "bin_of"), "*i64"),
        "part_lse": "*fp32",
    }
    for name, dtype, group, size, dim in SIZES:
        item = 4 if dtype == "fp32" else 2
        if not block_fits(dim, dim, size, item):
            continue
        config = pair_config(group, size, dim, dim, item, arch)
        options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
        common = {"HEADS": 2, "GROUP": group, "LIST": 96, "SIZE": size, "D": dim, "E": dim, "STEPS": 4}
        absent = ("cu" if not name else "lengths", "pages")
        for missing in (absent, ()) if dtype == "bf16" else (absent,):
            constants = {**common, "LENGTH": SEGMENT, **config, **dict.fromkeys(missing)}
            types = case_types(pair_kernel, dtype, constants, **kinds)
            title = f"pair_kernel{name}{' pages' * (not missing)}"
            yield CompileCase(title, pair_kernel, types, constants, options)
