# mypy: allow-untyped-defs
"""Attention over pages in Triton: many sequences in a call, their lengths, pages and modes on the device.

Two kernels, both of which find out by themselves which sequence they work for:

- `paged_query_kernel` walks the list of one query and kv head: the blocks selected for it, or, in a dense
  sequence, all blocks up to its own. Lists are cut among programs, whose partial results `merge_kernel` joins
  by their log-sum-exp. It is all there is in decoding, and serves the sparse sequences of short calls.
- `paged_tile_kernel` attends a tile of neighbouring queries of a dense sequence to all blocks up to theirs;
  it runs beside the other where a call may have that many new tokens in a sequence (`LEAST_TILED`).

Where many queries share a page, the sparse sequences of a call go page by page instead, by the kernels of
`triton_pairs`; `shared_enough` decides from shapes, as for the contiguous form.

Shapes: T queries of N sequences, K blocks of a list, G query heads a kv head, D/E key/value dim, S tokens of
a page.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    CompileCase,
    CompileCases,
    arch_of,
    cdiv,
    computable,
    find_document,
    find_sequence,
    on_device,
    search_steps,
)
from .pages import KVPages, PageTable
from .spec import BlockSpec
from .triton_attend import PROGRAMS, SIZES, add_rows, case_types, list_config, merge, split_list
from .triton_band import tile_config
from .triton_pairs import attend_rows, shared_enough
from .triton_rows import COUNTS, Rows, cores, inner_contiguous, load_rows, positive_factor

LEAST_TILED = 16  # new tokens that a sequence may have in a call, from which on dense ones go tile by tile


@triton.jit
def add_blocks(
    peak, mass, total, query, keys, values, listed, chosen, row_of, lo, hi, stop, position, highest, keys_p,
    keys_s, values_p, values_s, factor, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, PAD: tl.constexpr, SP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over places lo ... hi - 1 of a list of blocks, each of which is widened to PAD places.

    The list is `listed` where `chosen`, else all blocks in order; it ends before number `stop`. Blocks lie in
    the pages at `row_of`. With MASK a query sees tokens up to its `position`; `highest` is the last of these.
    """
    for i in range(lo, hi, SP):
        if PAD >= SP:  # part of one block: a single number is fetched ahead more easily
            slot = i // PAD
            inside = i % PAD + tl.arange(0, SP)
        else:
            slot = (i + tl.arange(0, SP)) // PAD
            inside = (i + tl.arange(0, SP)) % PAD
        if listed is None:
            block = tl.where(slot < stop, slot, -1)
        else:
            number = tl.load(listed + slot, mask=slot < tl.where(chosen, stop, 0), other=-1).to(tl.int32)
            block = tl.where(chosen, number, tl.where(slot < stop, slot, -1))
        page = tl.load(row_of + block, mask=(block >= 0) & (block * SIZE <= highest), other=0).to(tl.int64)
        token = tl.where(inside < SIZE, block * SIZE + inside, -1)  # negative as well if there is no block
        there = (token >= 0) & (token <= highest)
        peak, mass, total = add_rows(
            peak, mass, total, query, keys, values, page * keys_p + inside * keys_s,
            page * values_p + inside * values_s, there,
            there[None, :] & (token[None, :] <= position[:, None]), factor, D, DP, E, EP, MASK,
        )  # fmt: skip
    return peak, mass, total


@triton.jit
def store_rows(out, lse, place, there, peak, mass, total, E: tl.constexpr, EP: tl.constexpr):
    """Normalised results and their log-sum-exp at rows `place`; no log-sum-exp if there is no room for it."""
    e = tl.arange(0, EP)
    total = total * (1 / tl.where(mass > 0, mass, 1.0))[:, None]
    mask = there[:, None] & (e < E)[None, :]
    tl.store(out + place[:, None] * E + e[None, :], total.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        tl.store(lse + place, peak + tl.log2(mass), mask=there)


@triton.jit(do_not_specialize=COUNTS)
def paged_query_kernel(
    q, keys, values, blocks, cu, lengths, pages, sparse, out, lse, q_t, q_h, keys_p, keys_s, keys_h,
    values_p, values_s, values_h, tokens, sequences, per_row, factor, LEAST: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LIST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, STEPS: tl.constexpr, PAD: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    EP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """out `[splits, T, Hq, E]` and lse `[splits, T, Hq]` of one query and kv head over its share of the list.

    With LEAST = 1 rows of dense sequences are left as they are, with LEAST = 0 all are made.
    """
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) // HEADS
    h = (tl.program_id(1) % HEADS).to(tl.int64)
    n = find_sequence(cu, t, sequences, STEPS)
    chosen = tl.load(sparse + n)
    if chosen < LEAST:
        return
    position = (t + tl.load(lengths + n) - tl.load(cu + n + 1)).to(tl.int32)
    many = position // SIZE + 1
    if blocks is None:
        listed = None
    else:
        listed = blocks + (t * HEADS + h) * LIST
        many = tl.where(chosen != 0, LIST, many)
    share = tl.cdiv(many, tl.num_programs(1) // HEADS)
    first = part * share
    stop = tl.minimum(first + share, many)
    g = tl.arange(0, GP)
    row = h * GROUP + g
    query = load_rows(q, t * q_t + row * q_h, g < GROUP, D, DP)
    peak = tl.full((GP,), float("-inf"), tl.float32)
    mass = tl.zeros((GP,), tl.float32)
    total = tl.zeros((GP, EP), tl.float32)
    peak, mass, total = add_blocks(
        peak, mass, total, query, keys + h * keys_h, values + h * values_h, listed, chosen != 0,
        pages + n * per_row, first * PAD, stop * PAD, stop, position + g * 0, position, keys_p, keys_s,
        values_p, values_s, factor, SIZE, D, DP, E, EP, PAD, SP, True,
    )  # fmt: skip
    place = (part * tokens + t) * (HEADS * GROUP) + row
    store_rows(out, lse, place, g < GROUP, peak, mass, total, E, EP)


@triton.jit(do_not_specialize=COUNTS)
def paged_tile_kernel(
    q, keys, values, cu, lengths, pages, sparse, out, q_t, q_h, keys_p, keys_s, keys_h, values_p, values_s,
    values_h, sequences, per_row, factor, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr, PAD: tl.constexpr, GP: tl.constexpr,
    BQ: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out `[T, Hq, E]` of a tile of BQ queries of a dense sequence (any, if `sparse` is None) and one kv
    head."""
    h = tl.program_id(1).to(tl.int64)
    index = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # the longest first
    n, i = find_document(cu, index, sequences, BQ, STEPS)
    first = tl.load(cu + n).to(tl.int64) + i * BQ
    end = tl.load(cu + n + 1).to(tl.int64)
    last = tl.minimum(first + BQ, end)
    if sparse is not None:
        last = tl.where(tl.load(sparse + n) != 0, first, last)
    if last <= first:
        return
    lowest = (first + tl.load(lengths + n) - end).to(tl.int32)
    highest = lowest + (last - 1 - first).to(tl.int32)
    row = tl.arange(0, GP * BQ)
    g = row % GP
    t = first + row // GP
    there = (g < GROUP) & (t < last)
    position = tl.minimum(lowest + row // GP, highest)
    query = load_rows(q, t * q_t + (h * GROUP + g) * q_h, there, D, DP)
    peak = tl.full((GP * BQ,), float("-inf"), tl.float32)
    mass = tl.zeros((GP * BQ,), tl.float32)
    total = tl.zeros((GP * BQ, EP), tl.float32)
    many = highest // SIZE + 1
    # Up to here every query sees every key; where pages are no power of two, some places are no keys.
    middle = (lowest + 1) // BN * BN if PAD == SIZE else 0
    peak, mass, total = add_blocks(
        peak, mass, total, query, keys + h * keys_h, values + h * values_h, None, False, pages + n * per_row,
        0, middle, many, position, highest, keys_p, keys_s, values_p, values_s, factor, SIZE, D, DP, E, EP,
        PAD, BN, False,
    )  # fmt: skip
    peak, mass, total = add_blocks(
        peak, mass, total, query, keys + h * keys_h, values + h * values_h, None, False, pages + n * per_row,
        middle, many * PAD, many, position, highest, keys_p, keys_s, values_p, values_s, factor, SIZE, D, DP,
        E, EP, PAD, BN, True,
    )  # fmt: skip
    place = t * (HEADS * GROUP) + h * GROUP + g
    store_rows(out, None, place, there, peak, mass, total, E, EP)


def dense_config(
    tokens: int, group: int, size: int, dim: int, value_dim: int, itemsize: int, arch: int
) -> dict[str, int]:
    """The tiles of `paged_tile_kernel`, with the number of stages that does not spill."""
    tile = tile_config(tokens, group, dim, value_dim, itemsize, arch)
    if arch == 120:
        tile["num_stages"] = 2
    return {"PAD": 1 << (size - 1).bit_length(), **tile}


def triton_paged_attention(
    q: Tensor, pool: KVPages, table: PageTable, blocks: Tensor | None, spec: BlockSpec, scale: float
) -> Tensor:
    """See `paged_attention`. Nothing waits for the GPU: the number of programs follows from shapes."""
    queries, factor = positive_factor(inner_contiguous(computable(q.detach())), scale)
    pool = KVPages(*map(computable, pool))
    listed = None if blocks is None else blocks.contiguous()
    tokens, sequences = q.shape[0], table.lengths.shape[0]
    by_page = listed is not None and _shared_enough(queries, pool, table, listed, spec)
    tiled = by_page or tokens - sequences >= LEAST_TILED
    if listed is None and tiled:
        shape = (*q.shape[:2], pool.values.shape[3])
        out = torch.empty(shape, dtype=queries.dtype, device=q.device)
    elif listed is not None and by_page:
        out = _by_page(queries, pool, table, listed, spec, factor)
    else:
        out = _by_query(queries, pool, table, listed, spec, factor, sparse_only=tiled)
    if tiled:
        _by_tile(queries, pool, table, None if listed is None else table.sparse, out, spec, factor)
    return out.to(q.dtype)


def _by_query(
    q: Tensor, pool: KVPages, table: PageTable, blocks: Tensor | None, spec: BlockSpec, factor: float,
    *, sparse_only: bool,
) -> Tensor:  # fmt: skip
    """Attention `[T, Hq, E]` of every query, or of those of sparse sequences: other rows are then not
    made."""
    (tokens, heads, dim), (kv_heads, width) = q.shape, pool.values.shape[2:]
    chosen = 0 if blocks is None else blocks.shape[2]
    # Beside lists, dense sequences are short ones; programs of a longer one have more blocks each.
    longest = table.pages.shape[1] if blocks is None else min(table.pages.shape[1], 2 * chosen)
    splits = split_list(longest, PROGRAMS * cores(q.device) // max(1, tokens * kv_heads))
    kind = q.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, tokens, heads, width), dtype=kind, device=q.device)
    lse = torch.empty((splits, tokens, heads), dtype=torch.float32, device=q.device)
    group, sequences = heads // kv_heads, table.lengths.shape[0]
    config = list_config(group, spec.block_size, dim, width, q.element_size(), arch_of(q.device))
    with on_device(q):
        paged_query_kernel[(tokens, kv_heads * splits)](
            q, pool.keys, pool.values, blocks, table.cu_seqlens, table.lengths, table.pages, table.sparse,
            out, lse, *q.stride()[:2], *pool.keys.stride()[:3], *pool.values.stride()[:3], tokens, sequences,
            table.pages.shape[1], factor, LEAST=int(sparse_only), HEADS=kv_heads, GROUP=group, LIST=chosen,
            SIZE=spec.block_size, D=dim, E=width, STEPS=search_steps(sequences), **config,
        )  # fmt: skip
    if splits == 1:
        return out[0]
    whole = torch.empty(out.shape[1:], dtype=q.dtype, device=q.device)
    merge(out, lse, whole, torch.empty_like(lse[0]), splits, 1, 1, lse[0].numel())
    return whole


def _rows(tokens: int, pool: KVPages, table: PageTable) -> Rows:
    # A pool may hold fewer pages than a sequence has: those that its queries chose (`model.tiers`).
    room = max(pool.keys.shape[0], table.pages.shape[1]) * pool.keys.shape[1]
    return Rows(tokens, room, 0, table.lengths, table.cu_seqlens, None, table.pages, table.sparse)


def _shared_enough(q: Tensor, pool: KVPages, table: PageTable, blocks: Tensor, spec: BlockSpec) -> bool:
    rows = _rows(q.shape[0], pool, table)
    return shared_enough(q[None], pool.values, blocks[None], spec.block_size, rows)


def _by_page(
    q: Tensor, pool: KVPages, table: PageTable, blocks: Tensor, spec: BlockSpec, factor: float
) -> Tensor:
    """Attention `[T, Hq, E]` of the queries of sparse sequences; the rows of the others are not theirs."""
    tokens, cu = q.shape[0], table.cu_seqlens
    token = torch.arange(tokens, device=q.device, dtype=cu.dtype)
    number = (torch.searchsorted(cu, token, right=True) - 1).int()
    rows = _rows(tokens, pool, table)._replace(number=number)
    out = torch.empty(*q.shape[:2], pool.values.shape[3], dtype=q.dtype, device=q.device)[None]
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=q.device)
    attend_rows(q[None], pool.keys, pool.values, blocks[None], spec.block_size, rows, factor, out, lse)
    return out[0]


def _by_tile(
    q: Tensor, pool: KVPages, table: PageTable, sparse: Tensor | None, out: Tensor, spec: BlockSpec,
    factor: float,
) -> None:  # fmt: skip
    """Fill the rows of dense sequences of out `[T, Hq, E]`; of all, if `sparse` is None."""
    (tokens, heads, dim), (kv_heads, width) = q.shape, pool.values.shape[2:]
    group, sequences = heads // kv_heads, table.lengths.shape[0]
    shape = (group, spec.block_size, dim, width, q.element_size(), arch_of(q.device))
    config = dense_config(cdiv(tokens, sequences), *shape)
    with on_device(q):
        paged_tile_kernel[(tokens // config["BQ"] + sequences, kv_heads)](
            q, pool.keys, pool.values, table.cu_seqlens, table.lengths, table.pages, sparse, out,
            *q.stride()[:2], *pool.keys.stride()[:3], *pool.values.stride()[:3], sequences,
            table.pages.shape[1], factor, HEADS=kv_heads, GROUP=group, SIZE=spec.block_size, D=dim, E=width,
            STEPS=search_steps(sequences), **config,
        )  # fmt: skip


INTEGERS = (
    *("q_t", "q_h", "keys_p", "keys_s", "keys_h", "values_p", "values_s", "values_h"),
    *("tokens", "sequences", "per_row"),
)
KINDS = {**dict.fromkeys(INTEGERS, "i32"), **dict.fromkeys(("pages", "sparse"), "*i32")}
# Name, LEAST, LIST (0: no lists) and dtype of the results of `paged_query_kernel`, where it is not that of
# the queries: programs that share a list or a sequence leave float32.
QUERY_CASES = (("0", 0, 96, "fp32"), ("1", 1, 96, ""), ("0 dense", 0, 0, "fp32"), ("0 dense whole", 0, 0, ""))


def compile_cases(arch: int) -> CompileCases:
    """Decoding and the dense sequences of a prefill in all sizes; at the released size also steps in which
    all sequences are dense, and prefill of sparse ones."""
    for name, dtype, group, size, dim in SIZES:
        itemsize = 4 if dtype == "fp32" else 2
        common = {"HEADS": 2, "GROUP": group, "SIZE": size, "D": dim, "E": dim, "STEPS": 4}
        lists = list_config(group, size, dim, dim, itemsize, arch)
        options = {n: lists.pop(n) for n in ("num_warps", "num_stages")}
        for title, least, chosen, out in QUERY_CASES[: 1 if name else None]:
            absent = {} if chosen else {"blocks": None}
            constants = {**common, **lists, "LEAST": least, "LIST": chosen, **absent}
            types = case_types(paged_query_kernel, dtype, constants, **KINDS, out=f"*{out or dtype}")
            yield CompileCase(f"query{name} {title}", paged_query_kernel, types, constants, options)
        tile = dense_config(4096, group, size, dim, dim, itemsize, arch)
        options = {n: tile.pop(n) for n in ("num_warps", "num_stages")}
        for dense in (False, True) if not name else (False,):
            constants = {**common, **tile, **({"sparse": None} if dense else {})}
            types = case_types(paged_tile_kernel, dtype, constants, **KINDS)
            title = f"tile{name}{' dense' * dense}"
            yield CompileCase(title, paged_tile_kernel, types, constants, options)
