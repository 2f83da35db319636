# mypy: allow-untyped-defs
"""The elementwise steps of inference in Triton, one launch each: what a decoding step spends is launches.

No gradients. Rows may be parts of wider rows (the results of one product for several projections): where a
row begins is a stride, and its elements lie side by side. Everything is computed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, computable, on_device
from .triton import _gate_config, _rope_config, _storable
from .triton_kernels import _load

SILU_BLOCK = 1024  # elements a program


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    x, y, weight, total, out, rows, scale, eps, W: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr
):
    """total = x + scale * y (total = x, not written, without y) and out = its norm (not without weight)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    cells = row.to(tl.int64)[:, None] * W + columns[None, :]
    inside = (row < rows)[:, None] & (columns < W)[None, :]
    a = _load(x, cells, inside)
    if y is not None:
        a += scale * _load(y, cells, inside)
        tl.store(total + cells, a.to(total.dtype.element_ty), mask=inside)
    if weight is not None:
        a = a * tl.rsqrt(tl.sum(a * a, 1) / W + eps)[:, None] * _load(weight, columns, columns < W)[None, :]
        tl.store(out + cells, a.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate, up, out, gate_row, up_row, W: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, W] = silu(gate) * up; rows of gate and up begin gate_row and up_row elements apart."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < W
    g = _load(gate + row * gate_row, columns, inside)
    u = _load(up + row * up_row, columns, inside)
    tl.store(out + row * W + columns, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def split_heads_kernel(
    x, q_weight, k_weight, cos, sin, out, tokens, x_row, eps, H: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of H + 2 HKV heads -> all queries [tokens, H, D], then all keys, then all values.

    Queries and keys are normalised and turned, values are copied. A program holds ROWS heads.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // (H + 2 * HKV)
    head = row % (H + 2 * HKV)
    live = token < tokens
    columns = tl.arange(0, COLS)
    first = columns < HALF
    second = columns < D - HALF
    source = token[:, None] * x_row + head[:, None] * D + columns[None, :]
    a = _load(x, source, live[:, None] & first[None, :])
    b = _load(x, source + HALF, live[:, None] & second[None, :])
    is_q = (head < H)[:, None]
    is_v = (head >= H + HKV)[:, None]
    if q_weight is not None:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        qa = _load(q_weight, columns, first)[None, :]
        qb = _load(q_weight, columns + HALF, second)[None, :]
        ka = _load(k_weight, columns, first)[None, :]
        kb = _load(k_weight, columns + HALF, second)[None, :]
        a = tl.where(is_v, a, a * scale * tl.where(is_q, qa, ka))
        b = tl.where(is_v, b, b * scale * tl.where(is_q, qb, kb))
    if cos is not None:
        cells = token[:, None] * HALF + columns[None, :]
        c = _load(cos, cells, live[:, None] & first[None, :])
        s = _load(sin, cells, live[:, None] & first[None, :])
        turned_a, turned_b = a * c - b * s, b * c + a * s
        a = tl.where(is_v, a, turned_a)
        b = tl.where(is_v, b, turned_b)
    all_q = tokens.to(tl.int64) * H
    all_k = tokens.to(tl.int64) * HKV
    place = tl.where(head < H, token * H + head, all_q + token * HKV + head - H)
    place = tl.where(head < H + HKV, place, all_q + all_k + token * HKV + head - H - HKV)
    target = place[:, None] * D + columns[None, :]
    tl.store(out + target, a.to(out.dtype.element_ty), mask=live[:, None] & first[None, :])
    tl.store(out + target + HALF, b.to(out.dtype.element_ty), mask=live[:, None] & second[None, :])


def _rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x as rows of its last dimension, and how far they lie apart; copied only if they cannot be seen so."""
    x = computable(x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def triton_add_norm(
    x: Tensor, y: Tensor | None, scale: float, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, `rms_norm` (without y) and `add_scaled` (without weight) in one: (sum, norm) in x's
    dtype; what is not made is x itself."""
    a, b = computable(x).contiguous(), None if y is None else computable(y).contiguous()
    w = None if weight is None else computable(weight).contiguous()
    total = a if b is None else torch.empty_like(a)
    out = total if w is None else torch.empty_like(a)
    config = _gate_config(x.shape[-1], x.element_size())
    rows = x.numel() // x.shape[-1]
    with on_device(x):
        add_norm_kernel[(cdiv(rows, config["ROWS"]),)](
            a, b, w, total, out, rows, float(scale), float(eps), **config
        )
    return (x if b is None else total.to(x.dtype)), out.to(x.dtype)


def triton_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `silu_mul`."""
    (g, g_row), (u, u_row) = _rows_of(gate), _rows_of(up)
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    with on_device(g):
        silu_mul_kernel[(g.shape[0], cdiv(g.shape[1], SILU_BLOCK))](
            g, u, out, g_row, u_row, W=g.shape[1], BLOCK=SILU_BLOCK, num_warps=4
        )
    return out.view(gate.shape).to(gate.dtype)


def triton_split_heads(
    x: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `split_heads`: each `[B, T, heads, D]`, contiguous, in x's dtype."""
    batch, length, width = x.shape
    dim, tokens = width // (heads + 2 * kv_heads), batch * length
    rows, apart = _rows_of(x)
    kind = _storable(x.dtype)
    out = torch.empty(tokens * (heads + 2 * kv_heads) * dim, dtype=kind, device=x.device)
    config = _rope_config(dim, x.element_size())
    tables = [None if t is None else t.expand(batch, -1, -1).contiguous() for t in (cos, sin)]
    weights = [None if w is None else computable(w).contiguous() for w in (q_weight, k_weight)]
    with on_device(x):
        split_heads_kernel[(cdiv(tokens * (heads + 2 * kv_heads), config["ROWS"]),)](
            rows, *weights, *tables, out, tokens, apart, float(eps), H=heads, HKV=kv_heads, **config
        )
    sizes = (tokens * heads * dim, tokens * kv_heads * dim, tokens * kv_heads * dim)
    parts = (part.view(batch, length, -1, dim) for part in out.to(x.dtype).split(sizes))
    q, k, v = parts
    return q, k, v


def compile_cases(arch: int) -> CompileCases:
    """The released shapes in bf16; a model's first norm, which adds nothing, and a sum without a norm."""
    config = _gate_config(4096, 2)
    options = {"num_warps": config.pop("num_warps")}
    types = {"rows": "i32", "scale": "fp32", "eps": "fp32"}
    tensors = dict.fromkeys(("x", "y", "weight", "total", "out"), "*bf16")
    yield CompileCase("add_norm", add_norm_kernel, {**types, **tensors}, config, options)
    for name, absent in (("norm", "y"), ("add", "weight")):
        some = types | {n: kind for n, kind in tensors.items() if n != absent}
        yield CompileCase(f"add_norm {name} only", add_norm_kernel, some, {**config, absent: None}, options)
    yield CompileCase(
        "silu_mul", silu_mul_kernel,
        {**dict.fromkeys(("gate", "up", "out"), "*bf16"), "gate_row": "i32", "up_row": "i32"},
        {"W": 16384, "BLOCK": SILU_BLOCK}, {"num_warps": 4},
    )  # fmt: skip
    config = _rope_config(128, 2)
    options = {"num_warps": config.pop("num_warps")}
    types = {
        **dict.fromkeys(("x", "q_weight", "k_weight", "out"), "*bf16"),
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        **dict.fromkeys(("tokens", "x_row"), "i32"),
        "eps": "fp32",
    }
    yield CompileCase("split_heads", split_heads_kernel, types, {"H": 32, "HKV": 32, **config}, options)
