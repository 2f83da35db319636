"""Products with 8- and 4-bit codes: bit for bit those with the weights that the codes stand for."""

import pytest
import torch

from opensala.ops import linear
from opensala.ops.linear.quantised import QuantisedWeight, quantised_linear


def draw(rows, outer, inner, bits, group, zeros=True):
    generator = torch.Generator().manual_seed(rows + 100 * outer + inner + bits)
    low, high = (-128, 128) if bits == 8 else (0, 16)
    codes = torch.randint(low, high, (outer, inner), generator=generator)
    groups = -(-inner // group)
    scales = torch.rand(outer, groups, generator=generator) + 0.01
    shift = 8 * torch.rand(outer, groups, generator=generator) if zeros else None
    x, bias = torch.randn(rows, inner, generator=generator), torch.randn(outer, generator=generator)
    return x, codes, QuantisedWeight.from_codes(codes, scales, shift, bits=bits, group=group), bias


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("outer", "inner", "group"),
    [
        (5, 128, 128),
        (16, 576, 128),
        (33, 1536, 128),
        (50, 208, 16),
        (9, 130, 32),
        (3, 7, 7),
        (20, 300, 1000),
        (1, 1, 16),
    ],
)
def test_products_have_the_bits_of_dequantised_ones(outer, inner, group, bits, zeros):
    """One row, a few, and so many that the weights are written out in memory."""
    for rows in (*range(1, 10), 40):
        x, codes, weight, bias = draw(rows, outer, inner, bits, group, zeros)
        wide = weight.dequantised()
        assert torch.equal(
            quantised_linear(x, weight, bias, backend="cpp"), linear(x, wide, bias, backend="cpp")
        )
    assert torch.equal(weight.plain_codes().long(), codes) and weight.shape == (outer, inner)


@pytest.mark.parametrize(("bits", "middle"), [(8, 0), (4, 8)])
def test_what_a_code_stands_for(bits, middle):
    x, codes, weight, _ = draw(3, 6, 48, bits, 16, zeros=False)
    wanted = weight.scales.repeat_interleave(16, 1).double() * (codes - middle)
    assert torch.equal(weight.dequantised(), wanted.float())
    for backend in ("cpp", "torch"):
        found = quantised_linear(x, weight, backend=backend)
        torch.testing.assert_close(found.double(), x.double() @ wanted.T, rtol=1e-5, atol=1e-4)


def test_codes_take_the_bytes_they_should():
    _, _, weight, _ = draw(1, 64, 1024, 4, 128, zeros=False)
    assert weight.num_bytes == 64 * (1024 // 2 + 8 * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits must be 8 or 4, got 3"),
        ({"group": 24}, "group must be a multiple of 16, or at least K = 64, got 24"),
        ({"codes": torch.full((4, 64), 16)}, "codes of 4 bits must lie between 0 and 15, got 16 to 16"),
        ({"codes": torch.zeros(4)}, r"codes must be \[N, K\], got \[4\]"),
        ({"scales": torch.ones(4, 3)}, r"scales must be \[N, ceil\(K / group\)\] = \[4, 2\], got \[4, 3\]"),
        ({"zeros": torch.ones(3, 2)}, "zeros must be"),
    ],
)
def test_what_the_layout_does_not_take_is_refused(changes, message):
    given = {"codes": torch.ones(4, 64), "scales": torch.ones(4, 2), "zeros": None, "bits": 4, "group": 32}
    with pytest.raises(ValueError, match=message):
        QuantisedWeight.from_codes(**{**given, **changes})


def test_products_that_do_not_fit_are_refused():
    x, _, weight, bias = draw(2, 4, 32, 4, 32)
    with pytest.raises(ValueError, match=r"x must be float32 \[..., 32\], got torch.float32 \[2, 31\]"):
        quantised_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="got torch.float64"):
        quantised_linear(x.double(), weight)
    with pytest.raises(ValueError, match=r"bias must be \[4\]"):
        quantised_linear(x, weight, bias[:3])
