# mypy: allow-untyped-defs
"""Gradients of block-sparse attention in Triton, without atomic operations: the same sums in the same order
every time.

The queries' gradients walk the block lists again (as `attend_kernel`); those of keys and values go block by
block over the queries that chose a block (`triton_index`). A block that very many queries chose (the first
one is everybody's) is shared among programs, whose parts are added in order afterwards.

With S = factor * q.k and P = exp2(S - lse): dV = P^T dO, dS = P (dO V^T - delta), dQ = scale * dS K, dK =
scale * dS^T Q, delta = sum(O dO).

Shapes: B rows, T queries, K blocks of a list, G query heads a kv head, D/E key/value dim, S keys of a block.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, arch_of, cdiv, on_device, padded
from .triton_attend import SIZES, case_types, list_config, listed_tokens
from .triton_index import block_of, invert, place_of, segment_of
from .triton_rows import COUNTS, Rows, inner_contiguous, load_rows, locate

SEGMENT = 8192  # pairs of a block that one program sums up
ADDED = 32  # keys whose parts one program adds up


@triton.jit(do_not_specialize=COUNTS)
def query_grad_kernel(
    q, k, v, blocks, lengths, cu, number, out, d_out, lse, delta, d_q, q_b, q_t, q_h, k_b, k_t, k_h, v_b,
    v_t, v_h, do_b, do_t, do_h, tokens, length, capacity, factor, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, LIST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PAD: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """dq `[B, T, Hq, D]` and delta `[B, T, Hq]` of one query and kv head."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    position, start = locate(lengths, length, cu, number, b, t, tokens)
    g = tl.arange(0, GP)
    row = h * GROUP + g
    place = (b * tokens + t) * (HEADS * GROUP) + row
    query = load_rows(q, b * q_b + t * q_t + row * q_h, g < GROUP, D, DP)
    grad = load_rows(d_out, b * do_b + t * do_t + row * do_h, g < GROUP, E, EP)
    result = load_rows(out, place * E, g < GROUP, E, EP)
    product = tl.sum(result.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(delta + place, product, mask=g < GROUP)
    total = tl.load(lse + place, mask=g < GROUP, other=float("inf"))
    listed = blocks + ((b * tokens + t) * HEADS + h) * LIST
    keys = k + b * k_b + h * k_h + start * k_t
    values = v + b * v_b + h * v_h + start * v_t
    d_query = tl.zeros((GP, DP), tl.float32)
    for i in range(0, LIST * PAD, SP):
        token = listed_tokens(listed, 0, LIST, i, SIZE, PAD, SP)
        seen = (token >= 0) & (token <= position)
        there = seen & (token + start < capacity)
        x = load_rows(keys, token.to(tl.int64) * k_t, there, D, DP)
        y = load_rows(values, token.to(tl.int64) * v_t, there, E, EP)
        s = tl.dot(query, tl.trans(x), input_precision="ieee") * factor
        p = tl.where(seen[None, :], tl.exp2(s - total[:, None]), 0.0)
        d_p = tl.dot(grad, tl.trans(y), input_precision="ieee")
        d_s = p * (d_p - product[:, None])
        d_query = tl.dot(d_s.to(x.dtype), x, d_query, input_precision="ieee")
    d = tl.arange(0, DP)
    tl.store(
        d_q + place[:, None] * D + d[None, :],
        (d_query * scale).to(d_q.dtype.element_ty),
        mask=(g < GROUP)[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=COUNTS)
def key_grad_kernel(
    q, k, v, d_out, lse, delta, order, bounds, firsts, bin_of, lengths, cu, d_k, d_v, q_b, q_t, q_h, k_b,
    k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, tokens, length, documents, slots, bins, factor, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LIST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, LENGTH: tl.constexpr, STEPS: tl.constexpr, GP: tl.constexpr, PQ: tl.constexpr,
    DP: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Parts dk `[segments, S, D]` and dv `[segments, S, E]` (float32): SP keys of a block against a segment
    of its queries."""
    mine, first_pair, last_pair = segment_of(bin_of, bounds, firsts, bins, LENGTH)
    if mine >= bins:
        return
    slot, h, b = place_of(mine, slots, HEADS)
    block, start, total_keys, shift = block_of(slot, b, lengths, length, cu, documents, tokens, SIZE, STEPS)
    inside = tl.program_id(1) * SP + tl.arange(0, SP)
    token = block * SIZE + inside
    there = (inside < SIZE) & (token < total_keys)
    x = load_rows(k, b * k_b + h * k_h + (start + token) * k_t, there, D, DP)
    y = load_rows(v, b * v_b + h * v_h + (start + token) * v_t, there, E, EP)
    column = tl.arange(0, PQ * GP)
    g = column % GP
    d_keys = tl.zeros((SP, DP), tl.float32)
    d_values = tl.zeros((SP, EP), tl.float32)
    for i in range(first_pair, last_pair, PQ):
        pair = tl.load(order + i + column // GP, mask=i + column // GP < last_pair, other=-1)
        used = (pair >= 0) & (g < GROUP)
        t = tl.where(used, pair // (HEADS * LIST) - b * tokens, 0)
        row = h * GROUP + g
        query = load_rows(q, b * q_b + t * q_t + row * q_h, used, D, DP)
        grad = load_rows(d_out, b * do_b + t * do_t + row * do_h, used, E, EP)
        place = (b * tokens + t) * (HEADS * GROUP) + row
        total = tl.load(lse + place, mask=used, other=float("inf"))
        product = tl.load(delta + place, mask=used, other=0.0)
        s = tl.dot(x, tl.trans(query), input_precision="ieee") * factor
        seen = there[:, None] & (token[:, None] <= (t + shift)[None, :])
        p = tl.where(seen, tl.exp2(s - total[None, :]), 0.0)
        d_values = tl.dot(p.to(grad.dtype), grad, d_values, input_precision="ieee")
        d_p = tl.dot(y, tl.trans(grad), input_precision="ieee")
        d_s = p * (d_p - product[None, :])
        d_keys = tl.dot(d_s.to(query.dtype), query, d_keys, input_precision="ieee")
    place = tl.program_id(0).to(tl.int64) * SIZE + inside
    d = tl.arange(0, DP)
    e = tl.arange(0, EP)
    tl.store(
        d_k + place[:, None] * D + d[None, :],
        d_keys * scale,
        mask=(inside < SIZE)[:, None] & (d < D)[None, :],
    )
    tl.store(
        d_v + place[:, None] * E + e[None, :], d_values, mask=(inside < SIZE)[:, None] & (e < E)[None, :]
    )


@triton.jit(do_not_specialize=COUNTS)
def add_kernel(
    parts, out, firsts, cu, slots, documents, capacity, HEADS: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, STEPS: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """out `[B, L, Hkv, D]`: the parts of each block added up in order; zero where nobody chose the block."""
    mine = tl.program_id(0)
    slot, h, b = place_of(mine, slots, HEADS)
    block, start, keys, _ = block_of(slot, b, None, capacity, cu, documents, 0, SIZE, STEPS)
    inside = tl.program_id(1) * SP + tl.arange(0, SP)
    token = block * SIZE + inside
    there = (inside < SIZE) & (token < keys)
    d = tl.arange(0, DP)
    mask = there[:, None] & (d < D)[None, :]
    total = tl.zeros((SP, DP), tl.float32)
    for part in range(tl.load(firsts + mine), tl.load(firsts + mine + 1)):
        total += tl.load(parts + (part * SIZE + inside)[:, None] * D + d[None, :], mask=mask, other=0.0)
    place = (b * capacity + start + token) * HEADS + h
    tl.store(out + place[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


def key_grad_config(group: int, size: int, dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    wide, deep, heads = padded(dim), padded(value_dim), 1 << (group - 1).bit_length()
    large = max(wide, deep) > 128
    columns = 32 if itemsize == 2 or max(wide, deep) <= 64 else 16  # more of them spill registers
    keys = min(padded(size), (32 if large else 64) if itemsize == 2 else (16 if large else 32))
    if triton_interpreted():
        columns, keys = 256, padded(size)
    return {
        "GP": heads,
        "PQ": max(1, columns // heads),
        "DP": wide,
        "EP": deep,
        "SP": keys,
        "num_warps": 8,
        "num_stages": 1 if large and itemsize == 4 else 2,
    }


def attention_gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    size: int,
    rows: Rows,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v; lse in base 2, as the forward pass left it."""
    (batch, tokens, heads, dim), (kv_heads, width), chosen = q.shape, v.shape[2:], blocks.shape[3]
    group, factor, d_out, out = (
        heads // kv_heads,
        scale * math.log2(math.e),
        inner_contiguous(d_out),
        out.contiguous(),
    )
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    config = list_config(group, size, dim, width, q.element_size(), arch_of(q.device))
    with on_device(q):
        query_grad_kernel[(tokens, kv_heads, batch)](
            q, k, v, blocks, rows.lengths, rows.cu, rows.number, out, d_out, lse, delta, d_q, *strides,
            tokens, rows.length, k.shape[1], factor, scale, HEADS=kv_heads, GROUP=group, LIST=chosen,
            SIZE=size, D=dim, E=width, **config,
        )  # fmt: skip
    index = invert(blocks, size, rows, SEGMENT)
    segments = index.bin_of.numel()
    parts_k = torch.empty(segments, size, dim, dtype=torch.float32, device=q.device)
    parts_v = torch.empty(segments, size, width, dtype=torch.float32, device=q.device)
    config = key_grad_config(group, size, dim, width, q.element_size())
    pieces = cdiv(size, config["SP"])
    with on_device(q):
        key_grad_kernel[(segments, pieces)](
            q, k, v, d_out, lse, delta, index.order, index.bounds, index.firsts, index.bin_of, rows.lengths,
            rows.cu, parts_k, parts_v, *strides, tokens, rows.length, rows.documents, index.slots,
            index.bins, factor, scale, HEADS=kv_heads, GROUP=group, LIST=chosen, SIZE=size, D=dim, E=width,
            LENGTH=index.length, STEPS=rows.steps, **config,
        )  # fmt: skip
    grads, added = [], min(padded(size), ADDED)
    for x, parts in ((k, parts_k), (v, parts_v)):
        grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with on_device(q):
            add_kernel[(index.bins, cdiv(size, added))](
                parts, grad, index.firsts, rows.cu, index.slots, rows.documents, k.shape[1], HEADS=kv_heads,
                SIZE=size, D=x.shape[3], STEPS=rows.steps, DP=padded(x.shape[3]), SP=added, num_warps=4,
            )  # fmt: skip
        grads.append(grad)
    return d_q, grads[0], grads[1]


def compile_cases(arch: int) -> CompileCases:
    """All sizes; the first with lengths on the device, the others with packed documents."""
    integers = ("do_b", "do_t", "do_h", "documents", "slots", "bins")
    indices = ("order", "bounds", "firsts", "bin_of")
    for name, dtype, group, size, dim in SIZES:
        item = 4 if dtype == "fp32" else 2
        common = {
            "HEADS": 2,
            "GROUP": group,
            "LIST": 96,
            "SIZE": size,
            "D": dim,
            "E": dim,
            "STEPS": 4,
            "LENGTH": SEGMENT,
        }
        kinds = {**dict.fromkeys(integers, "i32"), **dict.fromkeys(indices, "*i64"), "parts": "*fp32"}
        absent = ("lengths",) if name else ("cu", "number")
        for kernel, config in (
            (query_grad_kernel, list_config(group, size, dim, dim, item, arch)),
            (key_grad_kernel, key_grad_config(group, size, dim, dim, item)),
            (add_kernel, {"DP": padded(dim), "SP": ADDED, "num_warps": 4, "num_stages": 2}),
        ):
            options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
            constants = {
                n: x
                for n, x in {**common, **config, **dict.fromkeys(absent)}.items()
                if n in kernel.arg_names
            }
            if kernel is key_grad_kernel:
                kinds.update(d_k="*fp32", d_v="*fp32")
            yield CompileCase(
                f"{kernel.__name__}{name}",
                kernel,
                case_types(kernel, dtype, constants, **kinds),
                constants,
                options,
            )
