# mypy: allow-untyped-defs
"""The Triton kernels of norm + rotary positions and norm + gate, forward and backward. All tensors are
contiguous.

Each reads its inputs once and writes its results once: several rows a program, a whole row at a time,
everything in float32 in between. The backward kernels normalise again instead of keeping anything; a fixed
number of their programs share the rows, and each leaves one partial sum of the weight's gradient, so that the
sum has one order.
"""

import triton
import triton.language as tl

_COUNTS = ["rows", "table_rows"]  # differ from call to call: no kernel of their own for each kind of number


@triton.jit
def _load(pointer, cells, mask):
    return tl.load(pointer + cells, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _angles(
    cos, sin, row, live, columns, H: tl.constexpr, HALF: tl.constexpr, table_rows, REPEATED: tl.constexpr
):
    """Cosines and sines for rows that are heads of tokens; with REPEATED one table of `table_rows` tokens
    serves all batches."""
    token = row // H
    if REPEATED:
        token = token % table_rows
    cells = token.to(tl.int64)[:, None] * HALF + columns[None, :]
    mask = live[:, None] & (columns < HALF)[None, :]
    return _load(cos, cells, mask), _load(sin, cells, mask)


@triton.jit
def silu_mul_flat_kernel(gate, up, out, elements, BLOCK: tl.constexpr):
    """out = silu(gate) * up, elements of any shape."""
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < elements
    g = _load(gate, cells, inside)
    y = g * tl.sigmoid(g) * _load(up, cells, inside)
    tl.store(out + cells, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_grad_kernel(gate, up, grad, dgate, dup, elements, BLOCK: tl.constexpr):
    """dgate and dup from grad."""
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < elements
    g, d = _load(gate, cells, inside), _load(grad, cells, inside)
    share = tl.sigmoid(g)
    up_part = d * _load(up, cells, inside)
    dg = up_part * share * (1.0 + g * (1.0 - share))
    tl.store(dgate + cells, dg.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + cells, (d * g * share).to(dup.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def norm_rope_kernel(
    x,
    weight,
    cos,
    sin,
    out,
    rows,
    table_rows,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    REPEATED: tl.constexpr,
):
    """out [rows, D]; a row is held as its first HALF elements and the others, which are turned together."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    live = row < rows
    cells = row.to(tl.int64)[:, None] * D + columns[None, :]
    in_a = live[:, None] & (columns < HALF)[None, :]
    in_b = live[:, None] & (columns < D - HALF)[None, :]
    a = _load(x, cells, in_a)
    b = _load(x, cells + HALF, in_b)
    if weight is not None:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        a = a * scale * _load(weight, columns, columns < HALF)[None, :]
        b = b * scale * _load(weight, columns + HALF, columns < D - HALF)[None, :]
    if cos is not None:
        c, s = _angles(cos, sin, row, live, columns, H, HALF, table_rows, REPEATED)
        a, b = a * c - b * s, b * c + a * s
    tl.store(out + cells, a.to(out.dtype.element_ty), mask=in_a)
    tl.store(out + cells + HALF, b.to(out.dtype.element_ty), mask=in_b)


@triton.jit(do_not_specialize=_COUNTS)
def norm_rope_grad_kernel(
    x,
    weight,
    cos,
    sin,
    grad,
    dx,
    dweight,
    rows,
    table_rows,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    REPEATED: tl.constexpr,
):
    """dx [rows, D], and one row of dweight [programs, D] for each program."""
    columns = tl.arange(0, COLS)
    if weight is not None:
        weight_a = _load(weight, columns, columns < HALF)[None, :]
        weight_b = _load(weight, columns + HALF, columns < D - HALF)[None, :]
        sum_a = tl.zeros([ROWS, COLS], tl.float32)
        sum_b = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < rows
        cells = row.to(tl.int64)[:, None] * D + columns[None, :]
        in_a = live[:, None] & (columns < HALF)[None, :]
        in_b = live[:, None] & (columns < D - HALF)[None, :]
        da = _load(grad, cells, in_a)
        db = _load(grad, cells + HALF, in_b)
        if cos is not None:
            c, s = _angles(cos, sin, row, live, columns, H, HALF, table_rows, REPEATED)
            da, db = da * c + db * s, db * c - da * s
        if weight is not None:
            a = _load(x, cells, in_a)
            b = _load(x, cells + HALF, in_b)
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
            a *= scale
            b *= scale
            sum_a += da * a
            sum_b += db * b
            da *= weight_a
            db *= weight_b
            along = (tl.sum(da * a, 1) + tl.sum(db * b, 1))[:, None] / D
            da = (da - a * along) * scale
            db = (db - b * along) * scale
        tl.store(dx + cells, da.to(dx.dtype.element_ty), mask=in_a)
        tl.store(dx + cells + HALF, db.to(dx.dtype.element_ty), mask=in_b)
    if weight is not None:
        at = tl.program_id(0) * D + columns
        tl.store(dweight + at, tl.sum(sum_a, 0), mask=columns < HALF)
        tl.store(dweight + at + HALF, tl.sum(sum_b, 0), mask=columns < D - HALF)


@triton.jit(do_not_specialize=_COUNTS)
def norm_gate_kernel(
    x, weight, gate, out, rows, gate_row, eps, W: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr
):
    """out [rows, W]; rows of the gate begin gate_row elements apart."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    cells = row.to(tl.int64)[:, None] * W + columns[None, :]
    inside = (row < rows)[:, None] & (columns < W)[None, :]
    y = _load(x, cells, inside)
    if weight is not None:
        y = y * tl.rsqrt(tl.sum(y * y, 1) / W + eps)[:, None] * _load(weight, columns, columns < W)[None, :]
    if gate is not None:
        places = row.to(tl.int64)[:, None] * gate_row + columns[None, :]
        y *= tl.sigmoid(_load(gate, places, inside))
    tl.store(out + cells, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def norm_gate_grad_kernel(
    x,
    weight,
    gate,
    grad,
    dx,
    dweight,
    dgate,
    rows,
    eps,
    W: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx, dgate [rows, W], and one row of dweight [programs, W] for each program."""
    columns = tl.arange(0, COLS)
    if weight is not None:
        factor = _load(weight, columns, columns < W)[None, :]
        total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        cells = row.to(tl.int64)[:, None] * W + columns[None, :]
        inside = (row < rows)[:, None] & (columns < W)[None, :]
        d = _load(grad, cells, inside)
        y = _load(x, cells, inside)
        if weight is not None:
            scale = tl.rsqrt(tl.sum(y * y, 1) / W + eps)[:, None]
            y *= scale
        if gate is not None:
            share = tl.sigmoid(_load(gate, cells, inside))
            normed = y * factor if weight is not None else y
            tl.store(
                dgate + cells, (d * normed * share * (1.0 - share)).to(dgate.dtype.element_ty), mask=inside
            )
            d *= share
        if weight is not None:
            total += d * y
            d *= factor
            d = (d - y * (tl.sum(d * y, 1) / W)[:, None]) * scale
        tl.store(dx + cells, d.to(dx.dtype.element_ty), mask=inside)
    if weight is not None:
        tl.store(dweight + tl.program_id(0) * W + columns, tl.sum(total, 0), mask=columns < W)
