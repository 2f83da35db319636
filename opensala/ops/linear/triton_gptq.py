# mypy: allow-untyped-defs
"""Products of few rows with 4- or 8-bit weights in the GPTQ layout, in Triton: decoding on a GPU is
reading weights, so they are read as they lie and widened in registers.

For many rows the weights are better written out once and multiplied by the library (`model/quantised.py`). No
gradients. Sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, computable, on_device
from .gptq import GptqTensors

MOST_ROWS = 16  # of x: the smallest side of a product, which fewer rows are filled up to
_COLUMNS = 64  # outputs of a program
_WORDS = 16  # of packed weights of an output at a time, at most: more spill in 8 bits with Triton 3.6
_PROGRAMS = 512  # at least so many share the work, where there are inputs enough


@triton.jit(do_not_specialize=["rows"])
def gptq_kernel(
    x, qweight, qzeros, scales, out, rows, outer, x_row, groups, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    SPLIT: tl.constexpr, BITS: tl.constexpr, PLUS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out [SPLIT, rows, outer] += x [rows, groups * GROUP] times the weights of a share of the groups.

    PLUS is what the layout stores zero points too low by.
    """
    PER: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    share = tl.program_id(1)
    row = tl.arange(0, BM)
    inside = n < outer
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    each = tl.cdiv(groups, SPLIT)
    for g in range(share * each, tl.minimum(groups, (share + 1) * each)):
        zero = tl.load(qzeros + g * (outer // PER) + n // PER, mask=inside, other=0)
        zero = ((zero >> ((n % PER) * BITS)) + PLUS) & MASK
        scale = tl.load(scales + g * outer + n, mask=inside, other=0.0).to(tl.float32)
        for first in tl.static_range(0, GROUP, CHUNK):
            k = g * GROUP + first + tl.arange(0, CHUNK)
            where = (k // PER).to(tl.int64)[:, None] * outer + n[None, :]
            word = tl.load(qweight + where, mask=inside[None, :], other=0)
            code = (word >> ((k % PER) * BITS)[:, None]) & MASK
            weight = (code - zero[None, :]).to(tl.float32) * scale[None, :]
            cells = row.to(tl.int64)[:, None] * x_row + k[None, :]
            left = tl.load(x + cells, mask=(row < rows)[:, None], other=0.0)
            acc = tl.dot(left, weight.to(left.dtype), acc, input_precision="ieee")
    cells = (share * rows + row).to(tl.int64)[:, None] * outer + n[None, :]
    tl.store(out + cells, acc, mask=(row < rows)[:, None] & inside[None, :])


def _power(group: int) -> int:
    """The largest power of two that divides a group; below 16 there is no product."""
    return group & -group


def beyond_triton(inner: int, group: int, rows: int, regular: bool) -> str | None:
    """Why the kernel cannot run such a product, or None."""
    if not regular:
        return "columns are in another order than groups"
    if rows > MOST_ROWS:
        return f"it is for {MOST_ROWS} rows at most, got {rows}"
    size = inner if group == -1 else group
    return None if _power(size) >= 16 else f"16 must divide the group, got {size}"


def triton_gptq(x: Tensor, tensors: GptqTensors, bits: int, group: int, layout: str) -> Tensor:
    """x `[R, K]`, R up to `MOST_ROWS`, times weights `[N, K]` transposed: `[R, N]` in x's dtype.

    `g_idx` is taken to be k // group. Rows of x may be slices of wider rows.
    """
    rows, inner = x.shape
    outer = tensors.qweight.shape[1]
    size = inner if group == -1 else group
    groups, given = inner // size, computable(x)
    split = _split(groups, outer)
    out = torch.empty(split, rows, outer, dtype=torch.float32, device=x.device)
    with on_device(x):
        gptq_kernel[(cdiv(outer, _COLUMNS), split)](
            given,
            tensors.qweight,
            tensors.qzeros,
            tensors.scales,
            out,
            rows,
            outer,
            given.stride(0),
            groups,
            **_constants(size, split, bits, layout),
        )
    return (out[0] if split == 1 else out.sum(0)).to(x.dtype)


def _split(groups: int, outer: int) -> int:
    """Programs that share the inputs of the same outputs."""
    return max(1, min(groups, _PROGRAMS // cdiv(outer, _COLUMNS)))


def _constants(group: int, split: int, bits: int, layout: str) -> dict[str, int]:
    return {
        "GROUP": group,
        "CHUNK": min(_WORDS * 32 // bits, _power(group)),
        "SPLIT": split,
        "BITS": bits,
        "PLUS": int(layout == "gptq"),
        "BN": _COLUMNS,
        "BM": MOST_ROWS,
        "num_warps": 4,
        "num_stages": 3,
    }


def compile_cases(arch: int) -> CompileCases:
    for bits, group, dtype in ((4, 128, "*bf16"), (4, 64, "*fp16"), (8, 128, "*bf16")):
        constants = _constants(group, 4, bits, "gptq")
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        yield CompileCase(
            f"{bits} bits, groups of {group}, {dtype}",
            gptq_kernel,
            {
                **{"x": dtype, "qweight": "*i32", "qzeros": "*i32", "scales": "*fp16", "out": "*fp32"},
                **{"rows": "i32", "outer": "i32", "x_row": "i32", "groups": "i32"},
            },
            constants,
            options,
        )
