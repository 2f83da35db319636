# mypy: allow-untyped-defs
"""New keys and values into their pages in Triton, with the compressed keys that they complete: one launch.

Some programs copy tokens, the others make one window each. A window reads the new keys from the call and the
cached ones from the pages, so that it need not wait for the programs that copy. Its sum has a fixed order: on
one machine a compressed key has the same bits however the tokens were cut into calls.

Windows of all sequences share one range of programs: sequence n owns as many as there are strides among its
new tokens (see `find_document`), and each looks up by itself which window it makes, if any.

Shapes: T new tokens of N sequences, Hkv kv heads, D/E key/value dim.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    CompileCase,
    CompileCases,
    cdiv,
    computable,
    find_document,
    find_sequence,
    on_device,
    padded,
    search_steps,
)
from .pages import KVPages, PageTable
from .spec import BlockSpec
from .triton_rows import COUNTS, inner_contiguous, load_rows, windows_in

LOADED = 8192  # elements of keys that a program sums at once


@triton.jit
def store_window(
    k, keys, level, cu, lengths, pages, slot, sequences, per_row, h, k_t, k_h, keys_p, keys_s, keys_h,
    level_p, level_s, level_h, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, PART: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The window of this level that ends in stride `slot` of all sequences' new tokens, if one does."""
    n, i = find_document(cu, slot, sequences, STRIDE, STEPS)
    start = tl.load(cu + n).to(tl.int64)
    length = tl.load(lengths + n)
    before = length - (tl.load(cu + n + 1).to(tl.int64) - start)
    j = windows_in(before, SIZE, STRIDE) + i
    exists = j < windows_in(length, SIZE, STRIDE)
    pages += n * per_row
    d = tl.arange(0, DP)
    total = tl.zeros((DP,), tl.float32)
    for first in range(0, tl.where(exists, SIZE, 0), PART):
        inside = first + tl.arange(0, PART)
        token = j * STRIDE + inside
        new = token >= before
        page = tl.load(pages + token // BLOCK, mask=(inside < SIZE) & (new == 0), other=0).to(tl.int64)
        cached = load_rows(
            keys + h * keys_h, page * keys_p + token % BLOCK * keys_s, (inside < SIZE) & (new == 0), D, DP
        )
        fresh = load_rows(k + h * k_h, (start + token - before) * k_t, (inside < SIZE) & new, D, DP)
        total += tl.sum(tl.where(new[:, None], fresh, cached).to(tl.float32), axis=0)
    end = j * STRIDE + (SIZE - 1)
    page = tl.load(pages + end // BLOCK, mask=exists, other=0).to(tl.int64)
    place = level + page * level_p + end % BLOCK // STRIDE * level_s + h * level_h
    tl.store(place + d, (total / SIZE).to(level.dtype.element_ty), mask=d < tl.where(exists, D, 0))


@triton.jit(do_not_specialize=COUNTS)
def store_kernel(
    k, v, keys, values, k1, k2, cu, lengths, pages, tokens, sequences, per_row, slots, slots2, k_t, k_h, v_t,
    v_h, keys_p, keys_s, keys_h, values_p, values_s, values_h, k1_p, k1_s, k1_h, k2_p, k2_s, k2_h,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    DP: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr, PART2: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One kv head: `slots` windows of the first level, `slots2` of the second, then BT tokens a program."""
    index = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    if index < slots:
        store_window(
            k, keys, k1, cu, lengths, pages, index, sequences, per_row, h, k_t, k_h, keys_p, keys_s, keys_h,
            k1_p, k1_s, k1_h, SIZE, STRIDE, BLOCK, D, DP, PART, STEPS,
        )  # fmt: skip
    elif index < slots + slots2:
        store_window(
            k, keys, k2, cu, lengths, pages, index - slots, sequences, per_row, h, k_t, k_h, keys_p, keys_s,
            keys_h, k2_p, k2_s, k2_h, 4 * SIZE, 4 * STRIDE, BLOCK, D, DP, PART2, STEPS,
        )  # fmt: skip
    else:
        t = (index - slots - slots2) * BT + tl.arange(0, BT)
        there = t < tokens
        n = find_sequence(cu, tl.where(there, t, 0), sequences, STEPS)
        position = t + tl.load(lengths + n) - tl.load(cu + n + 1)
        page = tl.load(pages + n * per_row + position // BLOCK, mask=there, other=0).to(tl.int64)
        slot = position % BLOCK
        x = load_rows(k + h * k_h, t * k_t, there, D, DP)
        y = load_rows(v + h * v_h, t * v_t, there, E, EP)
        d = tl.arange(0, DP)
        e = tl.arange(0, EP)
        to_keys = keys + h * keys_h + page * keys_p + slot * keys_s
        to_values = values + h * values_h + page * values_p + slot * values_s
        tl.store(to_keys[:, None] + d[None, :], x, mask=there[:, None] & (d < D)[None, :])
        tl.store(to_values[:, None] + e[None, :], y, mask=there[:, None] & (e < E)[None, :])


def _config(spec: BlockSpec, dim: int, value_dim: int) -> dict[str, int]:
    """The same for every call, whatever its tokens: it fixes the order in which a window is summed."""
    wide = padded(max(dim, value_dim))
    part, part2 = (
        min(1 << (size - 1).bit_length(), max(1, LOADED // wide))
        for size in (spec.kernel_size, spec.coarse_size)
    )
    return {
        "DP": padded(dim),
        "EP": padded(value_dim),
        "BT": max(1, LOADED // 2 // wide),
        "PART": part,
        "PART2": part2,
        "num_warps": 4,
    }


def triton_store_kv(k: Tensor, v: Tensor, pool: KVPages, table: PageTable, spec: BlockSpec) -> None:
    """See `store_kv`. Nothing waits for the GPU."""
    tokens, sequences = k.shape[0], table.lengths.shape[0]
    if tokens == 0:
        return
    k, v = (inner_contiguous(computable(x.detach().to(pool.keys.dtype))) for x in (k, v))
    target = KVPages(*map(computable, pool))
    (kv_heads, dim), value_dim = k.shape[1:], v.shape[2]
    config = _config(spec, dim, value_dim)
    slots, slots2 = (tokens // stride + sequences for stride in (spec.kernel_stride, spec.coarse_stride))
    with on_device(k):
        store_kernel[(slots + slots2 + cdiv(tokens, config["BT"]), kv_heads)](
            k, v, *target, table.cu_seqlens, table.lengths, table.pages, tokens, sequences,
            table.pages.shape[1], slots, slots2, *k.stride()[:2], *v.stride()[:2],
            *(stride for x in target for stride in x.stride()[:3]), SIZE=spec.kernel_size,
            STRIDE=spec.kernel_stride, BLOCK=spec.block_size, D=dim, E=value_dim,
            STEPS=search_steps(sequences), **config,
        )  # fmt: skip
    for x, y in zip(pool, target, strict=True):
        if x is not y:
            x.copy_(y)


STRIDES = tuple(f"{name}_{axis}" for name in ("keys", "values", "k1", "k2") for axis in "psh")


def compile_cases(arch: int) -> CompileCases:
    """The released sizes, and wide float32 heads with few tokens a block."""
    small = BlockSpec(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=4)
    for name, dtype, dim, spec in (("released", "bf16", 128, BlockSpec()), ("wide", "fp32", 256, small)):
        config = _config(spec, dim, dim)
        options = {"num_warps": config.pop("num_warps")}
        counts = ("tokens", "sequences", "per_row", "slots", "slots2", "k_t", "k_h", "v_t", "v_h")
        types = {
            **dict.fromkeys(("k", "v", "keys", "values", "k1", "k2"), f"*{dtype}"),
            **dict.fromkeys(("cu", "lengths", "pages"), "*i32"),
            **dict.fromkeys((*counts, *STRIDES), "i32"),
        }
        constants = {
            "SIZE": spec.kernel_size,
            "STRIDE": spec.kernel_stride,
            "BLOCK": spec.block_size,
            "D": dim,
            "E": dim,
            "STEPS": 4,
            **config,
        }
        yield CompileCase(f"store {name}", store_kernel, types, constants, options)
