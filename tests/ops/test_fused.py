"""Norm with rotary positions and norm with gate: every backend against the reference implementations, with
gradients."""

import pytest
import torch

from opensala.ops import norm_gate, norm_rope
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
