"""Norm with rotary positions and norm with gate: every backend against the reference implementations, with
gradients."""

import pytest
import torch

from opensala.ops import (
    add_rms_norm,
    add_scaled,
    norm_gate,
    norm_rope,
    rms_norm,
    silu_mul,
    split_heads,
)
from tests.ops.grid import BACKENDS, TRITON_DEVICE, assert_close

TRITON = [x for x in BACKENDS if x.id == "triton"]
SHAPES = [(1, 1, 1, 16), (2, 7, 3, 60), (1, 63, 2, 64), (1, 5, 4, 128), (1, 3, 1, 256)]


def draw(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    angle = normal(shape[0], shape[1], shape[3] // 2).double() * 50
    return normal(*shape), normal(shape[3]), angle.cos().to(dtype), angle.sin().to(dtype), normal(*shape)


def gradients(run, *leaves):
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights.to(out.device)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", ["both", "norm", "rope"])
def test_norm_rope_equals_naive(backend, shape, parts):
    x, weight, cos, sin, _ = draw(shape)
    weight = None if parts == "rope" else weight
    cos, sin = (None, None) if parts == "norm" else (cos, sin)
    wanted = gradients(lambda x, w: norm_rope(x, w, cos, sin, 1e-6, backend="naive"), x, weight)
    backend.compare(
        lambda x, w, c, s: gradients(lambda x, w: norm_rope(x, w, c, s, 1e-6, backend=backend.name), x, w),
        wanted,
        x,
        weight,
        cos,
        sin,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", ["both", "norm", "gate"])
def test_norm_gate_equals_naive(backend, shape, parts):
    x, weight, _, _, gate = draw(shape)
    weight = None if parts == "gate" else weight
    gate = None if parts == "norm" else gate
    wanted = gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="naive"), x, weight, gate)
    backend.compare(
        lambda x, w, g: gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend=backend.name), x, w, g),
        wanted,
        x,
        weight,
        gate,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_table_of_angles_serves_all_rows(backend):
    x, weight, cos, sin, _ = draw((3, 5, 2, 8))
    cos, sin = cos[:1], sin[:1]
    wanted = gradients(
        lambda x, w: norm_rope(x, w, cos.expand(3, -1, -1), sin.expand(3, -1, -1), 1e-6, backend="naive"),
        x,
        weight,
    )
    backend.compare(
        lambda x, w, c, s: gradients(lambda x, w: norm_rope(x, w, c, s, 1e-6, backend=backend.name), x, w),
        wanted,
        x,
        weight,
        cos,
        sin,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    x, weight, cos, sin, gate = draw((2, 3, 5, 16))
    x, gate = x.transpose(1, 2), gate.transpose(1, 2)  # [B, T, H, D] of another order in memory
    cos, sin = (
        cos.new_ones(2, 8, 5).cumsum(2).cos().transpose(1, 2),
        cos.new_ones(2, 8, 5).cumsum(1).sin().transpose(1, 2),
    )
    wanted = gradients(lambda x, w: norm_rope(x, w, cos, sin, 1e-6, backend="naive"), x, weight)
    backend.compare(
        lambda x, w, c, s: gradients(lambda x, w: norm_rope(x, w, c, s, 1e-6, backend=backend.name), x, w),
        wanted,
        x,
        weight,
        cos,
        sin,
    )
    wanted = gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="naive"), x, weight, gate)
    backend.compare(
        lambda x, w, g: gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend=backend.name), x, w, g),
        wanted,
        x,
        weight,
        gate,
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 100), (2, 2048)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_mul_equals_naive(backend, shape):
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = gradients(lambda a, b: silu_mul(a, b, backend="naive"), gate, up)
    backend.compare(
        lambda a, b: gradients(lambda a, b: silu_mul(a, b, backend=backend.name), a, b), wanted, gate, up
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 100), (2, 513), (40, 1536)], ids=str)
def test_silu_mul_of_16_bits_is_that_of_float32_rounded(shape, dtype):
    """Read as stored, in one kernel: the bits of widening first and rounding afterwards."""
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up = ((3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))
    apart = torch.stack([up, up], -1)[..., 0]  # not contiguous
    with torch.no_grad():
        out = silu_mul(gate, apart, backend="cpp")
        wanted = silu_mul(gate.float(), up.float(), backend="cpp").to(dtype)
    assert out.dtype == dtype and torch.equal(out, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_float32_may_come_out_rounded(backend):
    """As under autocast: stream, weight and the gradients by them in float32, all else in bfloat16."""
    x, weight, _, _, gate = draw((2, 7, 3, 60), torch.float32)
    leaves = [t.to(backend.device).requires_grad_() for t in (x, weight, gate.bfloat16())]
    out = norm_gate(*leaves, 1e-6, out_dtype=torch.bfloat16, backend=backend.name)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    wanted = norm_gate(*exact, 1e-6, backend="naive")
    assert out.dtype == torch.bfloat16 and [g.dtype for g in grads] == [t.dtype for t in leaves]
    assert_close(out, wanted.detach(), 2**-8)
    for a, b in zip(grads, torch.autograd.grad(wanted, exact, torch.ones_like(wanted)), strict=True):
        assert_close(a, b, 2**-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 3, 8), (2, 700, 3, 20)], ids=str)
def test_gradients_in_16_bits_are_rounded_once(dtype, tolerance, shape):
    """The compiled kernels read and write 16 bits; with many rows each thread sums its part of a weight's
    gradient."""
    x, weight, cos, sin, gate = draw(shape)
    half = [t.to(dtype).requires_grad_() for t in (x, gate)]
    wide = [t.detach().double().requires_grad_() for t in half]
    scales = [weight.float().requires_grad_(), weight.clone().requires_grad_()]

    def results(kind, x, gate, weight, dtype):
        flat = weight.repeat(shape[2])
        stream, rows = x.flatten(2).to(weight.dtype), gate.flatten(2)
        total, normed = add_rms_norm(stream, rows, 0.3, flat, 1e-6, out_dtype=dtype, backend=kind)
        turns = cos.to(weight.dtype), sin.to(weight.dtype)
        return [
            norm_rope(x, weight, *turns, 1e-6, backend=kind),
            norm_gate(x.flatten(2), flat, rows, 1e-6, backend=kind),
            silu_mul(x, gate, backend=kind),
            normed,
            add_scaled(total, rows, -0.7, backend=kind),
        ]

    got = results("cpp", *half, scales[0], dtype)
    wanted = results("naive", *wide, scales[1], torch.float64)
    assert [t.dtype for t in got] == [dtype] * 4 + [torch.float32]
    for a, b in zip(got, wanted, strict=True):
        assert_close(a.detach(), b.detach(), tolerance)
    noise = [torch.randn_like(t) for t in got]
    # Three roundings: of a sum, more than its own is in the difference.
    for n, weights in enumerate(noise):  # one by one: autograd adds up in 16 bits what flows to one tensor
        ways = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(got[n], [*half, scales[0]], weights, **ways)
        exact = torch.autograd.grad(wanted[n], [*wide, scales[1]], weights.double(), **ways)
        for a, b in zip(grads, exact, strict=True):
            assert_close(a, b, 3 * tolerance, f"step {n}")


def test_a_gradient_has_the_same_bits_every_time():
    """On any number of threads each sums its own rows in order."""
    x, weight, cos, sin, gate = draw((1, 900, 3, 40), torch.float32)
    found = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, weight, gate)]
        turned = norm_rope(leaves[0], leaves[1], cos, sin, 1e-6, backend="cpp")
        gated = norm_gate(turned, leaves[1], leaves[2], 1e-6, backend="cpp")
        found.append(torch.autograd.grad(gated, leaves, gate))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("width", [100, 16384])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_of_any_width(backend, width):
    x, weight, _, _, gate = draw((1, 2, 3 if width == 100 else 1, width))
    wanted = gradients(lambda x, w, g: norm_gate(x, w, g, 1e-3, backend="naive"), x, weight, gate)
    backend.compare(
        lambda x, w, g: gradients(lambda x, w, g: norm_gate(x, w, g, 1e-3, backend=backend.name), x, w, g),
        wanted,
        x,
        weight,
        gate,
    )


@pytest.mark.parametrize("backend", TRITON)
def test_programs_of_the_backward_kernels_share_the_rows(backend, monkeypatch):
    kernels = pytest.importorskip("opensala.ops.fused.triton")
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, weight, cos, sin, gate = draw((1, 37, 3, 128))
    assert x.numel() * 4 > 3 * 2 * kernels.GATE_TILE  # some program has more than one tile
    wanted = gradients(lambda x, w: norm_rope(x, w, cos, sin, 1e-6, backend="naive"), x, weight)
    backend.compare(
        lambda x, w, c, s: gradients(lambda x, w: norm_rope(x, w, c, s, 1e-6, backend=backend.name), x, w),
        wanted,
        x,
        weight,
        cos,
        sin,
    )
    wanted = gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="naive"), x, weight, gate)
    backend.compare(
        lambda x, w, g: gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend=backend.name), x, w, g),
        wanted,
        x,
        weight,
        gate,
    )


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_triton_rounds_once(dtype, tolerance):
    pytest.importorskip("triton")
    x, weight, cos, sin, gate = (t.to(TRITON_DEVICE, dtype) for t in draw((1, 20, 2, 32)))
    cos, sin = cos.float(), sin.float()
    exact = [t.double().cpu() for t in (x, weight, cos, sin, gate)]
    rope = gradients(lambda x, w: norm_rope(x, w, cos, sin, 1e-6, backend="triton"), x, weight)
    rope_wanted = gradients(lambda x, w: norm_rope(x, w, *exact[2:4], 1e-6, backend="naive"), *exact[:2])
    gated = gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="triton"), x, weight, gate)
    gated_wanted = gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="naive"), *exact[:2], exact[4])
    wide = norm_rope(x, weight, cos, sin, 1e-6, out_dtype=torch.float32, backend="triton")
    assert wide.dtype == torch.float32
    assert_close(wide, rope_wanted[0], 2e-6)
    for a, b in zip(rope + gated, rope_wanted + gated_wanted, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, 2 * tolerance)  # for the gradients: what comes in is rounded too


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_rounds_once(dtype, tolerance):
    x, weight, cos, sin, gate = draw((1, 40, 2, 32), dtype)
    got = norm_rope(x, weight, cos.float(), sin.float(), 1e-6)
    assert (
        got.dtype == dtype
        and norm_rope(x, weight, cos.float(), sin.float(), 1e-6, out_dtype=torch.float32).dtype
        == torch.float32
    )
    assert_close(
        got,
        norm_rope(x.double(), weight.double(), cos.double(), sin.double(), 1e-6, backend="naive"),
        tolerance,
    )
    assert_close(
        norm_gate(x, weight, gate, 1e-6),
        norm_gate(x.double(), weight.double(), gate.double(), 1e-6, backend="naive"),
        tolerance,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: norm_rope(x, torch.ones(3), None, None, 1e-6), r"weight must be \[8\]"),
        (lambda x: norm_rope(x, None, torch.ones(1, 5, 8), torch.ones(1, 5, 8), 1e-6), "cos must be"),
        (lambda x: norm_rope(x, None, torch.ones(1, 5, 4), None, 1e-6), "come together"),
        (lambda x: norm_gate(x, None, torch.ones(3), 1e-6), "gate must have x's shape"),
        (lambda x: norm_gate(x, torch.ones(3), None, 1e-6), "as wide as x"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 5, 2, 8))


ROWS = [(1, 7), (5, 16), (3, 100), (64, 130), (2, 3, 257)]


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_rows_equal_naive_with_gradients(shape, backend):
    x, y = torch.randn(2, *shape)
    weight = torch.rand(shape[-1]) + 0.5

    def results(kind, *tensors):
        x, y, w = tensors
        total, normed = add_rms_norm(x, y, 0.3, w, 1e-6, backend=kind)
        return total, normed, rms_norm(x, w, 1e-6, backend=kind), silu_mul(x, y, backend=kind)

    leaves = [t.clone().requires_grad_() for t in (x, y, weight)]
    wide = [t.double().requires_grad_() for t in (x, y, weight)]
    got, wanted = results(backend, *leaves), results("naive", *wide)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-6)
    with torch.no_grad():  # the compiled kernels themselves
        for a, b in zip(results(backend, x, y, weight), wanted, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-6)
    noise = [torch.randn_like(b) for b in wanted]
    gradients = torch.autograd.grad(got, leaves, [n.float() for n in noise])
    for a, b in zip(gradients, torch.autograd.grad(wanted, wide, noise), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [*ROWS, (2, 1024)], ids=str)
@pytest.mark.parametrize("backend", TRITON)
@torch.no_grad()
def test_triton_rows_equal_naive(backend, shape):
    """Whole rows, and gates and factors that are parts of wider rows."""
    x, y, gate, up = torch.randn(4, *shape, dtype=torch.float64)
    weight = torch.rand(shape[-1], dtype=torch.float64) + 0.5

    def results(kind, x, y, w, both):
        gate, up = both.chunk(2, -1)
        return [
            *add_rms_norm(x, y, 0.3, w, 1e-6, backend=kind),
            rms_norm(x, w, 1e-6, backend=kind),
            add_scaled(x, y, -1.7, backend=kind),
            silu_mul(gate, up, backend=kind),
            norm_gate(x, w, gate, 1e-6, backend=kind),
            norm_gate(x, None, up, 1e-6, backend=kind),
        ]

    inputs = x, y, weight, torch.cat([gate, up], -1)
    backend.compare(lambda *t: results(backend.name, *t), results("naive", *inputs), *inputs)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 20), (1, 1, 128), (32, 2, 64)])
@pytest.mark.parametrize("parts", ["both", "norm", "rope", "neither"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_split_heads_equals_naive(backend, heads, kv_heads, dim, parts):
    """From rows that stand in wider ones (a gate behind the values), several tokens and rows of a batch."""
    inner = (heads + 2 * kv_heads) * dim
    wide = torch.randn(2, 7, inner + 24, dtype=torch.float64)
    weights = torch.rand(2, dim, dtype=torch.float64) + 0.5
    angle = torch.rand(2, 7, dim // 2, dtype=torch.float64) * 50

    def results(kind, wide, weights, cos, sin):
        q_weight, k_weight = weights if parts in ("both", "norm") else (None, None)
        cos, sin = (cos, sin) if parts in ("both", "rope") else (None, None)
        return split_heads(
            wide[..., :inner], heads, kv_heads, q_weight, k_weight, cos, sin, 1e-6, backend=kind
        )

    inputs = wide, weights, angle.cos(), angle.sin()
    wanted = results("naive", *inputs)
    assert [x.shape[2:] for x in wanted] == [(heads, dim), (kv_heads, dim), (kv_heads, dim)]
    torch.testing.assert_close(wanted[2], wide[..., inner - kv_heads * dim : inner].unflatten(-1, (-1, dim)))
    backend.compare(lambda *t: results(backend.name, *t), wanted, *inputs)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads in a row"):
        split_heads(torch.ones(1, 2, 30), 2, 1, None, None, None, None, 1e-6)
    with pytest.raises(ValueError, match="come together"):
        split_heads(torch.ones(1, 2, 32), 2, 1, torch.ones(8), None, None, None, 1e-6)


def test_no_bit_of_a_row_depends_on_the_others():
    """Of all steps of this module: alone, in any batch, with any number of threads."""
    threads, heads, dim = torch.get_num_threads(), 3, 20
    x, y = torch.randn(2, 700, heads * dim)
    weight, narrow = torch.rand(heads * dim), torch.rand(dim)
    angles = torch.rand(1, 700, dim // 2)

    def results(rows):
        a, b, turn = x[rows], y[rows], angles[:, rows]
        q = a.view(1, len(a), heads, dim)
        with torch.no_grad():
            return [
                rms_norm(a, weight, 1e-6),
                *add_rms_norm(a, b, 0.7, weight, 1e-6),
                silu_mul(a, b),
                norm_gate(a, weight, b, 1e-6),
                norm_gate(a, None, b, 1e-6),
                norm_rope(q, narrow, turn.cos(), turn.sin(), 1e-6)[0],
                norm_rope(q, None, turn.cos(), turn.sin(), 1e-6)[0],
            ]

    wanted = results(torch.arange(700))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for rows in (torch.tensor([5]), torch.tensor([699, 3]), torch.randperm(700), torch.arange(650)):
            for a, b in zip(results(rows), wanted, strict=True):
                assert torch.equal(a, b[rows])
    torch.set_num_threads(threads)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(torch.ones(2, 3), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="y must have x's shape"):
        add_rms_norm(torch.ones(2, 3), torch.ones(2, 4), 1.0, torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="up must have gate's shape"):
        silu_mul(torch.ones(2, 3), torch.ones(3, 2))
