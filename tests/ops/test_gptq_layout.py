"""The GPTQ layout of quantised weights: words laid out by hand, as the format's other readers take them."""

import pytest
import torch

from opensala.ops.linear.gptq import (
    Codes,
    GptqTensors,
    from_gptq,
    gptq_shapes,
    pack_words,
    to_gptq,
    unpack_words,
)


def codes_of(outer, inner, bits, group, seed=0):
    torch.manual_seed(seed)
    groups = inner // group
    return Codes(
        torch.randint(0, 1 << bits, (outer, inner), dtype=torch.int32),
        torch.rand(outer, groups).half().float(),
        torch.randint(0, 1 << bits, (outer, groups), dtype=torch.int32),
        torch.arange(inner) // group,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_codes_lowest_bits_first(bits):
    per_word = 32 // bits
    codes = torch.arange(per_word, dtype=torch.int32)[:, None] + torch.tensor([[1, 2]])
    expected = [sum((n + c) << bits * n for n in range(per_word)) for c in (1, 2)]
    assert [w % 2**32 for w in pack_words(codes, bits)[0].tolist()] == expected
    top = torch.full((2 * per_word, 3), (1 << bits) - 1, dtype=torch.int32)
    assert pack_words(top, bits).tolist() == [[-1] * 3] * 2, "the sign bit is a bit like any other"
    assert torch.equal(unpack_words(pack_words(codes, bits), bits), codes)


@pytest.mark.parametrize("bits, group", [(4, 16), (4, 64), (8, 16), (8, 64)])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_round_trip(bits, group, layout):
    codes = codes_of(24, 64, bits, group)
    made = to_gptq(codes, bits, layout)
    assert {n: tuple(x.shape) for n, x in made._asdict().items()} == gptq_shapes(24, 64, bits, group)
    back = from_gptq(made, bits, layout)
    assert all(torch.equal(a, b) for a, b in zip(codes, back, strict=True))


def test_a_file_of_another_writer():
    """Eight columns of eight outputs by hand: codes 0 to 7 in column order, zero point 8 stored as 7."""
    word = sum(k << 4 * k for k in range(8))
    tensors = GptqTensors(
        torch.full((1, 8), word - 2**32 if word >= 2**31 else word, dtype=torch.int32),
        torch.tensor([[0x77777777]], dtype=torch.int32),
        torch.full((1, 8), 0.5, dtype=torch.float16),
        torch.zeros(8, dtype=torch.int32),
    )
    weights = from_gptq(tensors, 4).weights()
    assert weights.tolist() == [[0.5 * (k - 8) for k in range(8)]] * 8
    shifted = from_gptq(tensors, 4, "gptq_v2").weights()
    assert torch.equal(shifted, weights + 0.5), "version 2 stores the zero point itself"


def test_columns_reordered_by_activation():
    """`g_idx` of act-order: the group of a column is what it says, not its place."""
    codes = codes_of(8, 32, 4, 16)._replace(groups=torch.tensor([0, 1] * 16))
    weights = from_gptq(to_gptq(codes, 4), 4).weights()
    n, k = 3, 5
    expected = codes.scales[n, 1] * (codes.codes[n, k] - codes.zeros[n, 1])
    assert weights[n, k] == expected


@pytest.mark.parametrize(
    "outer, inner, bits, group, said",
    [
        (64, 64, 3, 64, "bits must be 4 or 8, got 3"),
        (
            64,
            576,
            4,
            128,
            "a group of 128 does not divide the 576 columns of a weight; 64, 32, 16 or -1 would",
        ),
        (64, 64, 4, 0, "a group of 0"),
        (60, 64, 4, 64, "60 x 64 do not fill words of 8 codes"),
        (64, 60, 4, -1, "64 x 60 do not fill words of 8 codes"),
    ],
)
def test_what_does_not_fit_is_refused(outer, inner, bits, group, said):
    with pytest.raises(ValueError, match=said):
        gptq_shapes(outer, inner, bits, group)
