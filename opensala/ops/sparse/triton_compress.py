# mypy: allow-untyped-defs
"""Compressed keys in Triton: the mean of every full window, written where a cache or a packed call keeps
them.

One program sums a few windows of one head in float32. Windows overlap, so a key is read kernel_size /
kernel_stride times; all but the first read hit the cache of the GPU, and the whole step is a small part of
writing the keys.

Shapes: B rows, Hkv kv heads, D head dim, n windows.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, computable, find_document, on_device, padded
from .triton_rows import COUNTS, Rows, inner_contiguous, windows_in

LOADED = 8192  # elements of keys that a program holds at once


def _config(windows: int, size: int, dim: int) -> dict[str, int]:
    wide = padded(dim)
    together = min(16, 1 << max(0, windows - 1).bit_length())
    part = min(1 << (size - 1).bit_length(), max(1, LOADED // (together * wide)))
    return {"BW": together, "PART": part, "DP": wide}


@triton.jit(do_not_specialize=COUNTS)
def compress_kernel(
    k, out, past, cu, past_all, new_tokens, capacity, room, documents, k_b, k_t, k_h, o_b, o_n, o_h,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BW: tl.constexpr,
    PART: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Windows that end among the new tokens of a row, or (with cu) all windows of all documents, BW a
    program."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    if cu is not None:
        n, j = find_document(cu, slot, documents, STRIDE, STEPS)
        start = tl.load(cu + n).to(tl.int64) + j * STRIDE
        exists = start + SIZE <= tl.load(cu + n + 1)
    else:
        if past is not None:
            before = tl.load(past + b).to(tl.int64)
        else:
            before = past_all + b * 0
        slot += windows_in(before, SIZE, STRIDE)
        start = slot * STRIDE
        exists = start + SIZE <= before + new_tokens
    exists = exists & (slot < room) & (start + SIZE <= capacity)
    d = tl.arange(0, DP)
    total = tl.zeros((BW, DP), tl.float32)
    for first in range(0, SIZE, PART):
        i = first + tl.arange(0, PART)
        token = start[:, None] + i[None, :]
        there = exists[:, None] & (i < SIZE)[None, :]
        x = tl.load(
            k + (b * k_b + h * k_h + token * k_t)[:, :, None] + d[None, None, :],
            mask=there[:, :, None] & (d < D)[None, None, :],
            other=0.0,
        )
        total += tl.sum(x.to(tl.float32), axis=1)
    target = out + (b * o_b + h * o_h + slot * o_n)[:, None] + d[None, :]
    tl.store(target, (total / SIZE).to(out.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


def _launch(
    k: Tensor, out: Tensor, past: Tensor | int, new_tokens: int, size: int, stride: int, rows: Rows | None
) -> None:
    documents = 0 if rows is None else rows.documents
    windows = out.shape[1] if documents else cdiv(new_tokens, stride)
    if windows == 0 or k.shape[0] == 0:
        return
    config = _config(windows, size, k.shape[3])
    with on_device(k):
        compress_kernel[(cdiv(windows, config["BW"]), k.shape[2], k.shape[0])](
            k, out, past if isinstance(past, Tensor) else None, rows.cu if rows and documents else None,
            0 if isinstance(past, Tensor) else past, new_tokens, k.shape[1], out.shape[1], documents,
            *k.stride()[:3], *out.stride()[:3], SIZE=size, STRIDE=stride, D=k.shape[3],
            STEPS=rows.steps if rows else 1, **config, num_warps=4,
        )  # fmt: skip


def triton_extend_compressed(
    k: Tensor, out: Tensor, past: Tensor | int, new_tokens: int, kernel_size: int, kernel_stride: int
) -> None:
    """See `extend_compressed`. A row's number of finished windows may stay on the GPU: the grid allows for
    the most."""
    k = inner_contiguous(k.detach())
    if isinstance(past, Tensor):
        past = past.to(k.device, non_blocking=True)
    target = computable(out)
    _launch(computable(k), target, past, new_tokens, kernel_size, kernel_stride, None)
    if target is not out:
        out.copy_(target)


def compress_packed(k: Tensor, kernel_size: int, kernel_stride: int, rows: Rows) -> Tensor:
    """Windows of packed documents, each in its own slots: `[1, T, Hkv, D]` -> `[1, T // stride + N, Hkv,
    D]`."""
    out = torch.empty(1, rows.slots(kernel_stride), *k.shape[2:], dtype=k.dtype, device=k.device)
    _launch(k, out, 0, k.shape[1], kernel_size, kernel_stride, rows)
    return out


def _types(dtype: str, **absent: None) -> Mapping[str, str]:
    integers = (
        "past_all",
        "new_tokens",
        "capacity",
        "room",
        "documents",
        "k_b",
        "k_t",
        "k_h",
        "o_b",
        "o_n",
        "o_h",
    )
    pointers = {"k": f"*{dtype}", "out": f"*{dtype}", "past": "*i32", "cu": "*i32"}
    return {**{n: t for n, t in pointers.items() if n not in absent}, **dict.fromkeys(integers, "i32")}


def compile_cases(arch: int) -> CompileCases:
    """Decoding and prefill at the released sizes, and packed documents at a small one."""
    for name, dtype, windows, size, dim, absent in (
        ("decode", "bf16", 1, 128, 128, {"cu": None}), ("prefill", "bf16", 999, 32, 128, {"cu": None}),
        ("packed", "fp32", 99, 8, 64, {"past": None}),
    ):  # fmt: skip
        constants = {
            "SIZE": size,
            "STRIDE": size // 2,
            "D": dim,
            "STEPS": 4,
            **_config(windows, size, dim),
            **absent,
        }
        yield CompileCase(
            f"compress {name}", compress_kernel, _types(dtype, **absent), constants, {"num_warps": 4}
        )
