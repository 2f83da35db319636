"""Norm with rotary positions and norm with gate: every backend against the plain statements, with gradients."""

import pytest
import torch

from opensala.ops import norm_gate, norm_rope
from tests.ops.grid import BACKENDS, assert_close

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
    (out.double() * weights).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", ["both", "norm", "rope"])
def test_norm_rope_equals_naive(backend, shape, parts):
    x, weight, cos, sin, _ = draw(shape)
    weight = None if parts == "rope" else weight
    cos, sin = (None, None) if parts == "norm" else (cos, sin)
    wanted = gradients(lambda x, w: norm_rope(x, w, cos, sin, 1e-6, backend="naive"), x, weight)
    backend.compare(lambda x, w, c, s: gradients(lambda x, w: norm_rope(x, w, c, s, 1e-6, backend=backend.name), x, w),
                    wanted, x, weight, cos, sin)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", ["both", "norm", "gate"])
def test_norm_gate_equals_naive(backend, shape, parts):
    x, weight, _, _, gate = draw(shape)
    weight = None if parts == "gate" else weight
    gate = None if parts == "norm" else gate
    wanted = gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="naive"), x, weight, gate)
    backend.compare(lambda x, w, g: gradients(lambda x, w, g: norm_gate(x, w, g, 1e-6, backend=backend.name), x, w, g),
                    wanted, x, weight, gate)


def test_one_table_of_angles_serves_all_rows():
    x, weight, cos, sin, _ = draw((3, 5, 2, 8))
    got = norm_rope(x, weight, cos[:1], sin[:1], 1e-6)
    assert_close(got, norm_rope(x, weight, cos[:1].expand(3, -1, -1), sin[:1].expand(3, -1, -1), 1e-6, backend="naive"), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_rounds_once(dtype, tolerance):
    x, weight, cos, sin, gate = draw((1, 40, 2, 32), dtype)
    got = norm_rope(x, weight, cos.float(), sin.float(), 1e-6)
    assert got.dtype == dtype and norm_rope(x, weight, cos.float(), sin.float(), 1e-6, out_dtype=torch.float32).dtype == torch.float32
    assert_close(got, norm_rope(x.double(), weight.double(), cos.double(), sin.double(), 1e-6, backend="naive"), tolerance)
    assert_close(norm_gate(x, weight, gate, 1e-6), norm_gate(x.double(), weight.double(), gate.double(), 1e-6, backend="naive"), tolerance)


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: norm_rope(x, torch.ones(3), None, None, 1e-6), r"weight must be \[8\]"),
    (lambda x: norm_rope(x, None, torch.ones(1, 5, 8), torch.ones(1, 5, 8), 1e-6), "cos must be"),
    (lambda x: norm_rope(x, None, torch.ones(1, 5, 4), None, 1e-6), "come together"),
    (lambda x: norm_gate(x, None, torch.ones(3), 1e-6), "gate must have x's shape"),
    (lambda x: norm_gate(x, torch.ones(3), None, 1e-6), "as wide as x"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 5, 2, 8))
