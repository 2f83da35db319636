"""The most likely token and the sum of exponentials: against float64, at ties and edges, whatever else is in
the call."""

import math

import pytest
import torch

from opensala.ops import likeliest

BACKENDS = ["cpp", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 1024, 1041, 73_448])
@pytest.mark.parametrize("scale", [0.01, 3, 60])
def test_equals_float64(backend, width, scale):
    logits = scale * torch.randn(5, width)
    exact = logits.double()
    for row, x, token in zip(likeliest(logits, backend=backend), exact, logits.argmax(-1), strict=True):
        assert row.token == token and (row.lowest, row.highest) == (x.min(), x.max())
        assert row.lse == pytest.approx(float(x.logsumexp(-1)), abs=2e-6 * max(1, scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("places", [(0, 1), (3, 40), (15, 16), (16, 17), (49, 50)])
def test_the_lowest_number_of_several(backend, places):
    logits = torch.randn(1, 51)
    logits[0, list(places)] = 9.0
    assert likeliest(logits, backend=backend)[0].token == places[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 7, 16, 35, 39])
def test_what_is_not_finite_shows(backend, place):
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.randn(3, 40)
        logits[1, place] = value
        first, damaged, last = likeliest(logits, backend=backend)
        shown = (damaged.lse, damaged.lowest, damaged.highest)
        assert not all(map(math.isfinite, shown))
        for row in (first, last):
            assert all(map(math.isfinite, (row.lse, row.lowest, row.highest)))


def test_a_row_has_the_same_bits_alone():
    """However many rows and threads: enough of them for a second thread to be asked."""
    logits, before = 5 * torch.randn(40, 4099), torch.get_num_threads()
    together = likeliest(logits, backend="cpp")
    for count in (1, 3):
        torch.set_num_threads(count)
        assert likeliest(logits, backend="cpp") == together
    torch.set_num_threads(before)
    assert [likeliest(x[None], backend="cpp")[0] for x in logits] == together
    assert likeliest(logits.t().contiguous().t(), backend="cpp") == together, "any strides"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    logits = torch.randn(3, 50).to(dtype)
    for row, x in zip(likeliest(logits), logits.double(), strict=True):
        assert row.token == x.argmax() and row.lse == pytest.approx(float(x.logsumexp(-1)), abs=1e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"logits must be \[N, V\]"):
        likeliest(torch.zeros(shape))


def test_no_rows():
    assert likeliest(torch.zeros(0, 5)) == []


def test_a_backend_that_it_lacks():
    with pytest.raises(ValueError, match="likeliest has no such form"):
        likeliest(torch.zeros(1, 5), backend="triton")
