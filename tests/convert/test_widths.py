"""Few bits: packing is exact, errors are bounded and shrink with the bits, the budget goes where it helps."""

import pytest
import torch

from opensala.convert.moments import input_moments
from opensala.convert.widths import (
    allowed,
    choose_widths,
    dequantise,
    error_of,
    pack,
    quantise,
    size_of,
    unpack,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_packing_is_exact(bits):
    half = 1 << (bits - 1)
    levels = torch.randint(-half, half, (5, 48), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack(levels, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 6 * bits)
    assert torch.equal(unpack(packed, bits), levels)


def test_a_known_row_of_four_bits():
    levels = torch.tensor([[-8, 7, 0, 1, -1, 2, -2, 3]], dtype=torch.int8)
    assert pack(levels, 4).tolist() == [[0xF0, 0x98, 0xA7, 0xB6]]


@pytest.mark.parametrize("bits,most", [(4, 0.12), (5, 0.056), (6, 0.029), (8, 0.01)])
def test_the_relative_error_of_normal_numbers(bits, most):
    x = normal(40, 192) * 10.0 ** torch.arange(-3, 5).repeat_interleave(5)[:, None]
    x[3, :64] = 0
    q, scale = quantise(x, bits)
    assert scale.shape == (40, 3) and scale.dtype == torch.float16
    assert q.shape == (40, 192 * bits // 8)
    found = dequantise(q, scale, bits)
    assert ((found - x).norm(dim=1) < most * x.norm(dim=1)).all()
    assert not found[3, :64].any()


def test_the_searched_scale_is_better_than_the_largest_entry():
    x = normal(64, 64)
    scale = x.abs().amax(1, keepdim=True) / 7
    plain = ((x / scale).round() * scale - x).square().sum()
    assert error_of(x, 4) < 0.9 * plain


def test_the_level_without_an_opposite_is_used_for_either_sign():
    levels = torch.arange(-8, 8).repeat(4)[None].float()
    for x in (0.25 * levels, -0.25 * levels):
        assert torch.equal(dequantise(*quantise(x, 4), 4), x)


def test_moments_lower_the_error_of_products():
    given = normal(4000, 16, seed=1) @ normal(16, 64, seed=2)  # correlated, as a model's inputs are
    given = given + 0.3 * normal(4000, 64, seed=3)
    moments, x = given.T @ given / len(given), normal(32, 64)
    errors = []
    for known in (None, moments):
        lost = dequantise(*quantise(x, 4, known), 4) - x
        errors.append((given @ lost.T).square().mean())
    assert errors[1] < 0.5 * errors[0]
    assert error_of(x, 4, moments) == pytest.approx(float(errors[1]) * len(x), rel=1e-3)


def test_inputs_that_are_always_zero_do_no_harm():
    given = normal(500, 64)
    given[:, 7] = 0
    q, scale = quantise(normal(8, 64), 5, given.T @ given / 500)
    assert torch.isfinite(dequantise(q, scale, 5)).all()


def test_bits_go_where_they_save_most():
    tensors = {
        "a": normal(64, 64),
        "b": normal(64, 64, seed=1),
        "norm": normal(64),
        "x.lora_a": normal(4, 64),
    }
    weights = {"a": 100.0, "b": 1.0, "norm": 1.0, "x.lora_a": 1.0}
    smallest = sum(size_of(x, allowed(n, x)[0]) for n, x in tensors.items())
    widths = choose_widths(tensors, weights, smallest + 64 * 64 // 8, 0)
    assert widths == {"a": 5, "b": 4, "norm": 16, "x.lora_a": 6}
    assert set(choose_widths(tensors, weights, 10**6, 0).values()) == {16}
    assert choose_widths(tensors, weights, 0, 0) == {"a": 4, "b": 4, "norm": 16, "x.lora_a": 6}


def test_moments_are_those_of_the_inputs():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.own = torch.nn.Embedding(10, 6), torch.nn.Linear(6, 3, bias=False)

        def forward(self, ids, use_cache):
            return self.own(self.table(ids))

    model, ids = Reader(), torch.arange(8).view(2, 4)
    found = input_moments(model, {"own.weight", "table.weight"}, ids)
    given = model.table(ids).flatten(0, 1).detach()
    assert set(found) == {"own.weight"}
    torch.testing.assert_close(found["own.weight"], given.T @ given / 8)


def test_more_bits_that_cost_nothing_are_taken():
    """Rows of two entries have a scale for every two: eight bits take what sixteen take."""
    factors = {"w.lora_b": torch.randn(8, 2, generator=torch.Generator().manual_seed(0))}
    assert size_of(factors["w.lora_b"], 8) == size_of(factors["w.lora_b"], 16)
    assert choose_widths(factors, {"w.lora_b": 1.0}, 10_000, 200) == {"w.lora_b": 16}
