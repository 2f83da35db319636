# mypy: allow-untyped-defs
"""Block-sparse attention in Triton, query by query: one program walks the block list of one query and kv
head.

The G query heads that share a list are the rows of its products (padded to 16). It is the path of decoding
and of short calls. A list can be cut among several programs, whose partial results `merge_kernel` joins by
their log-sum-exp, so that a single query keeps the GPU busy. Long calls, in which many queries share a key
block, go block by block (`triton_pairs`).

Scores are kept in base 2: softmax(scale * q.k) is exp2(factor * q.k - lse) with factor = scale * log2(e).

Shapes: B rows, T queries, K blocks of a list, G query heads a kv head, D/E key/value dim, S keys of a block.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, arch_of, cdiv, on_device, padded
from .triton_rows import COUNTS, Rows, cores, load_rows, locate

PROGRAMS = 4  # programs for each multiprocessor that a call should have at least
LEAST_SHARE = 2  # blocks of a list that are worth a program of their own
MERGED = 4096  # elements of partial results that a merging program holds at once


def list_config(group: int, size: int, dim: int, value_dim: int, itemsize: int, arch: int) -> dict[str, int]:
    """Block sizes of the kernels that walk block lists, with num_warps and num_stages."""
    wide, deep, pad = padded(dim), padded(value_dim), 1 << (size - 1).bit_length()
    part = 64 if itemsize == 2 else 32  # keys at a time
    fits = 3 * part * (wide + deep) * itemsize <= 96 * 1024 and itemsize == 2
    if triton_interpreted():
        part = 256  # fewer steps: it is their number that takes the interpreter's time
    return {
        "PAD": pad,
        "GP": padded(group),
        "DP": wide,
        "EP": deep,
        "SP": part,
        "num_warps": 8 if itemsize == 4 and max(wide, deep) > 64 else 4,
        "num_stages": 3 if fits else 2,
    }


@triton.jit
def listed_tokens(listed, first, stop, i, SIZE: tl.constexpr, PAD: tl.constexpr, SP: tl.constexpr):
    """Tokens i ... i + SP - 1 of the list, each of its blocks widened to PAD tokens: numbers in the sequence,
    or negative."""
    if PAD >= SP:  # part of one block: a single number is fetched ahead more easily
        slot = first + i // PAD
        inside = i % PAD + tl.arange(0, SP)
    else:
        slot = first + (i + tl.arange(0, SP)) // PAD
        inside = (i + tl.arange(0, SP)) % PAD
    block = tl.load(listed + slot, mask=slot < stop, other=-1).to(tl.int32)
    return tl.where(inside < SIZE, block * SIZE + inside, -1)


@triton.jit
def add_rows(
    peak, mass, total, query, keys, values, k_at, v_at, there, seen, factor, D: tl.constexpr,
    DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows of `query` over the keys and values at offsets k_at and v_at, where `there`.

    With MASK a row of `query` sees the keys for which `seen` (`[1, keys]` or `[rows, keys]`) is true, perhaps
    none. Keys and values are brought to the dtype of the query. factor is positive (`positive_factor`).
    """
    x = load_rows(keys, k_at, there, D, DP).to(query.dtype)
    s = tl.dot(query, tl.trans(x), input_precision="ieee")
    if MASK:
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(peak, tl.max(s, axis=1) * factor)
    base = tl.where(higher == float("-inf"), 0.0, higher) if MASK else higher
    p = tl.exp2(s * factor - base[:, None])  # one instruction, as the factor comes last
    shrink = tl.exp2(peak - base)
    mass = mass * shrink + tl.sum(p, axis=1)
    y = load_rows(values, v_at, there, E, EP).to(query.dtype)
    total = tl.dot(p.to(y.dtype), y, total * shrink[:, None], input_precision="ieee")
    return higher, mass, total


@triton.jit(do_not_specialize=COUNTS)
def attend_kernel(
    q, k, v, blocks, lengths, cu, number, out, lse, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, tokens,
    length, capacity, factor, HEADS: tl.constexpr, GROUP: tl.constexpr, LIST: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, PAD: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """out `[SPLITS, B, T, Hq, E]` and lse `[SPLITS, B, T, Hq]` of one query and kv head over its share of the
    list."""
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) // HEADS
    h = (tl.program_id(1) % HEADS).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    position, start = locate(lengths, length, cu, number, b, t, tokens)
    g = tl.arange(0, GP)
    row = h * GROUP + g
    query = load_rows(q, b * q_b + t * q_t + row * q_h, g < GROUP, D, DP)
    listed = blocks + ((b * tokens + t) * HEADS + h) * LIST
    keys = k + b * k_b + h * k_h + start * k_t
    values = v + b * v_b + h * v_h + start * v_t
    SHARE: tl.constexpr = (LIST + SPLITS - 1) // SPLITS
    peak = tl.full((GP,), float("-inf"), tl.float32)
    mass = tl.zeros((GP,), tl.float32)
    total = tl.zeros((GP, EP), tl.float32)
    first = part * SHARE
    stop = tl.minimum(first + SHARE, LIST)
    for i in range(0, SHARE * PAD, SP):
        token = listed_tokens(listed, first, stop, i, SIZE, PAD, SP)
        seen = (token >= 0) & (token <= position)
        there = seen & (token + start < capacity)
        token = token.to(tl.int64)
        peak, mass, total = add_rows(
            peak, mass, total, query, keys, values, token * k_t, token * v_t, there, seen[None, :], factor,
            D, DP, E, EP, True,
        )  # fmt: skip
    total = total * (1 / tl.where(mass > 0, mass, 1.0))[:, None]
    place = ((part * tl.num_programs(2) + b) * tokens + t) * (HEADS * GROUP) + row
    tl.store(lse + place, peak + tl.log2(mass), mask=g < GROUP)
    e = tl.arange(0, EP)
    tl.store(
        out + place[:, None] * E + e[None, :],
        total.to(out.dtype.element_ty),
        mask=(g < GROUP)[:, None] & (e < E)[None, :],
    )


@triton.jit
def part_shares(part_lse, base, there, first, count, step, TOGETHER: tl.constexpr):
    """Log-sum-exp `[R, TOGETHER]` of parts first ... first + TOGETHER - 1; -inf where there is none."""
    p = first + tl.arange(0, TOGETHER)
    place = base[:, None] + p[None, :].to(tl.int64) * step
    return tl.load(part_lse + place, mask=there[:, None] & (p < count)[None, :], other=float("-inf"))


@triton.jit
def part_rows(
    parts, share, base, first, step, TOGETHER: tl.constexpr, E: tl.constexpr, EP: tl.constexpr
):  # fmt: skip
    """Those parts `[R, TOGETHER, EP]` themselves. What was never written may be NaN, so it is not read: no
    weight would cancel it."""
    place = base[:, None] + (first + tl.arange(0, TOGETHER))[None, :].to(tl.int64) * step
    e = tl.arange(0, EP)
    return tl.load(
        parts + place[:, :, None] * E + e[None, None, :],
        mask=(share > float("-inf"))[:, :, None] & (e < E)[None, None, :],
        other=0.0,
    )


@triton.jit
def part_weights(share, total):
    """Weights `[R, TOGETHER, 1]` of parts in a row whose whole log-sum-exp is `total`."""
    return tl.where(share > float("-inf"), tl.exp2(share - total[:, None]), 0.0)[:, :, None]


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(
    parts, part_lse, out, lse, rows, count, outer, inner, step, E: tl.constexpr, EP: tl.constexpr,
    R: tl.constexpr, MANY: tl.constexpr, TOGETHER: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Join `count` partial attentions of R rows each: a weighted mean, weights exp2(lse - total lse).

    Part p of row r stands at row (r // inner) * outer + r % inner + p * step of `parts`; parts whose lse is
    -inf were never written. With MORE, `out` and `lse` hold one more part of each row.
    """
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    base = (r // inner) * outer + r % inner
    all_lse = part_shares(part_lse, base, r < rows, 0, count, step, MANY)
    peak = tl.max(all_lse, axis=1)
    if MORE:
        here = tl.load(lse + r, mask=r < rows, other=float("-inf"))
        peak = tl.maximum(peak, here)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.sum(tl.exp2(all_lse - peak[:, None]), axis=1)
    if MORE:
        weights += tl.exp2(here - peak)
    total = peak + tl.log2(weights)
    e = tl.arange(0, EP)
    result = tl.zeros((R, EP), tl.float32)
    if MORE:
        known = here > float("-inf")
        cells = r[:, None] * E + e[None, :]
        x_here = tl.load(out + cells, mask=known[:, None] & (e < E)[None, :], other=0.0)
        result += x_here.to(tl.float32) * tl.where(known, tl.exp2(here - total), 0.0)[:, None]
    for first in range(0, count, TOGETHER):
        share = part_shares(part_lse, base, r < rows, first, count, step, TOGETHER)
        x = part_rows(parts, share, base, first, step, TOGETHER, E, EP)
        result += tl.sum(x.to(tl.float32) * part_weights(share, total), axis=1)
    if MORE:
        tl.debug_barrier()  # another thread may have read what this one is about to write
    tl.store(
        out + r[:, None] * E + e[None, :],
        result.to(out.dtype.element_ty),
        mask=(r < rows)[:, None] & (e < E)[None, :],
    )
    tl.store(lse + r, total, mask=r < rows)


def merge(
    parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, count: int, outer: int, inner: int, step: int,
    more: bool = False,
) -> None:  # fmt: skip
    """Join partial attentions (see `merge_kernel`) into out `[..., E]` and its lse `[...]`, both
    contiguous; with `more` they are a part too."""
    config = merge_config(lse.numel(), count, out.shape[-1])
    with on_device(out):
        merge_kernel[(cdiv(lse.numel(), config["R"]),)](
            parts, part_lse, out, lse, lse.numel(), count, outer, inner, step, E=out.shape[-1], MORE=more,
            **config,
        )  # fmt: skip


def merge_config(rows: int, count: int, width: int) -> dict[str, Any]:
    wide = padded(width)
    together = min(8, 1 << (count - 1).bit_length())
    few = 1 if rows <= 1024 else 16  # few rows: spread them over the multiprocessors
    return {
        "R": max(1, min(few, MERGED // (together * wide))),
        "TOGETHER": together,
        "MANY": 1 << (count - 1).bit_length(),
        "EP": wide,
        "num_warps": 4,
    }


def split_list(chosen: int, wanted: int) -> int:
    """Programs that share a list: at most `wanted`, and one of few numbers, as each is a kernel of its
    own."""
    splits = max(1, chosen // LEAST_SHARE)
    while splits > max(1, wanted):
        splits = splits // 2
    return splits


def attend_by_query(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, rows: Rows, factor: float
) -> tuple[Tensor, Tensor]:
    """out `[B, T, Hq, E]` in q's dtype and lse `[B, T, Hq]` in base 2; every head of q, k, v contiguous."""
    (batch, tokens, heads, dim), (kv_heads, width), chosen = q.shape, v.shape[2:], blocks.shape[3]
    splits = split_list(chosen, PROGRAMS * cores(q.device) // max(1, batch * tokens * kv_heads))
    shape = (batch, tokens, heads, width)
    out = torch.empty((splits, *shape), dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    lse = torch.empty((splits, *shape[:3]), dtype=torch.float32, device=q.device)
    config = list_config(heads // kv_heads, size, dim, width, q.element_size(), arch_of(q.device))
    with on_device(q):
        attend_kernel[(tokens, kv_heads * splits, batch)](
            q, k, v, blocks, rows.lengths, rows.cu, rows.number, out, lse, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], tokens, rows.length, k.shape[1], factor, HEADS=kv_heads,
            GROUP=heads // kv_heads, LIST=chosen, SIZE=size, D=dim, E=width, SPLITS=splits, **config,
        )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    whole = torch.empty(shape, dtype=q.dtype, device=q.device)
    whole_lse = torch.empty_like(lse[0])
    merge(out, lse, whole, whole_lse, splits, 1, 1, whole_lse.numel())
    return whole, whole_lse


INTEGERS = (
    *("q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h"),
    *("tokens", "length", "capacity", "per_row"),
)
KINDS = {
    "pages": "*i32",
    "sparse": "*i32",
    "blocks": "*i32",
    "lengths": "*i32",
    "cu": "*i32",
    "number": "*i32",
    "lse": "*fp32",
    "delta": "*fp32",
    "factor": "fp32",
    "scale": "fp32",
}


def case_types(kernel: Any, dtype: str, constants: Mapping[str, Any], **kinds: str) -> dict[str, str]:
    """Types of a kernel's run-time arguments: all that are not constants; integers and pointers to `dtype` by
    default."""
    known = {**KINDS, **dict.fromkeys(INTEGERS, "i32"), **kinds}
    return {name: known.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constants}


# name, dtype, query heads a kv head, block size, head dim: the release, a wide head, odd ones in float32
SIZES = (
    ("", "bf16", 16, 64, 128),
    (" wide", "bf16", 8, 64, 256),
    (" large blocks", "fp16", 2, 128, 128),
    (" float", "fp32", 3, 64, 60),
    (" float 128", "fp32", 16, 64, 128),
    (" float wide", "fp32", 2, 64, 256),
)


def compile_cases(arch: int) -> CompileCases:
    """Whole lists of packed documents in all sizes, split ones of the release; merging the parts of a
    decoding step and those of pairs."""
    for name, dtype, group, size, dim in SIZES:
        for splits, absent in ((1, ("lengths",)), (48, ("cu", "number")))[: 1 if name else 2]:
            config = list_config(group, size, dim, dim, 4 if dtype == "fp32" else 2, arch)
            options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
            constants = {
                "HEADS": 2,
                "GROUP": group,
                "LIST": 96,
                "SIZE": size,
                "D": dim,
                "E": dim,
                "SPLITS": splits,
                **config,
                **dict.fromkeys(absent),
            }
            types = case_types(attend_kernel, dtype, constants)
            yield CompileCase(f"attend_kernel{name} {splits}", attend_kernel, types, constants, options)
    integers = dict.fromkeys(("rows", "count", "outer", "inner", "step"), "i32")
    for rows, count, parts, out in (
        (32, 48, "fp32", "bf16"),
        (1 << 16, 96, "bf16", "bf16"),
        (1 << 16, 96, "fp32", "fp32"),
    ):
        config = merge_config(rows, count, 128)
        options = {"num_warps": config.pop("num_warps")}
        constants = {"E": 128, "MORE": count == 96, **config}
        kinds = {**integers, "part_lse": "*fp32", "parts": f"*{parts}"}
        types = case_types(merge_kernel, out, constants, **kinds)
        yield CompileCase(f"merge_kernel {rows} {parts}", merge_kernel, types, constants, options)
