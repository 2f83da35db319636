"""The linear layer: the compiled product against float64, and each row bit for bit whatever rows share its
call."""

import pytest
import torch

from opensala.ops import linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INNER = [1, 7, 16, 63, 64, 500]
OUTER = [1, 5, 16, 50]
EPSILON = 2.0**-24  # half a unit in the last place of float32


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(rows, inner, outer, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 1000 + inner + outer)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inner), (outer, inner), (outer,))
    )
    return x, weight.to(dtype), bias


def assert_as_exact_as_the_sum_allows(got, x, weight, bias):
    """A sum over lanes makes at most K / 4 + 4 roundings (of 4 floats or more), one for the bias."""
    wanted = linear(x.double(), weight.double(), bias.double(), backend="naive")
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    error = ((got.double() - wanted).abs() / size).max()
    assert error <= (x.shape[-1] / 4 + 6) * EPSILON, f"{error / EPSILON:.1f} roundings"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_cpp_equals_naive(inner, outer, dtype):
    for rows in (*range(1, 10), 33, 70):
        x, weight, bias = draw(rows, inner, outer, dtype)
        assert_as_exact_as_the_sum_allows(linear(x, weight, bias, backend="cpp"), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks_of_weights_and_many_rows(dtype):
    x, weight, bias = draw(600, 1030, 83, dtype)  # three bands of rows, three blocks of weights
    assert_as_exact_as_the_sum_allows(linear(x, weight, bias, backend="cpp"), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(1, 5), (7, 1), (63, 21), (128, 48), (500, 70), (2050, 35)])
def test_rows_keep_their_bits_in_any_batch(inner, outer, dtype, threads):
    x, weight, bias = draw(300, inner, outer, dtype)
    threads(1)
    alone = torch.cat([linear(row[None], weight, bias, backend="cpp") for row in x])
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2):
        threads(count)
        assert torch.equal(linear(x, weight, bias, backend="cpp"), alone)
        for rows in (2, 3, 4, 5, 6, 7, 8, 9, 70, 257):
            start = torch.randint(300 - rows, (1,), generator=generator).item()
            cut = slice(start, start + rows)
            assert torch.equal(linear(x[cut], weight, bias, backend="cpp"), alone[cut])
            mixed = torch.randperm(300, generator=generator)[:rows]
            assert torch.equal(linear(x[mixed], weight, bias, backend="cpp"), alone[mixed])


def test_columns_keep_their_bits_in_a_joined_weight():
    x, weight, bias = draw(37, 300, 90)
    whole = linear(x, weight, bias, backend="cpp")
    parts = [linear(x, weight[a:b], bias[a:b], backend="cpp") for a, b in ((0, 33), (33, 40), (40, 90))]
    assert torch.equal(whole, torch.cat(parts, -1))


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_strided_inputs(rows):
    x, weight, bias = draw(rows, 48, 20)
    wide = torch.full((rows, 3, 100), float("nan"))
    wide[:, 1, 7:55] = x
    got = linear(wide[:, 1, 7:55], weight, bias, backend="cpp")
    assert torch.equal(got, linear(x, weight, bias, backend="cpp"))
    turned = linear(x.T.contiguous().T, weight.T.contiguous().T, bias.repeat(2)[::2], backend="cpp")
    assert torch.equal(turned, linear(x, weight, bias.repeat(2)[::2].clone(), backend="cpp"))
    assert torch.equal(linear(x[:, None, None], weight, bias, backend="cpp"), got[:, None, None])


def test_without_bias_and_without_rows():
    x, weight, bias = draw(5, 30, 20)
    assert torch.equal(
        linear(x, weight, backend="cpp"), linear(x, weight, torch.zeros_like(bias), backend="cpp")
    )
    assert linear(x[:0], weight, bias, backend="cpp").shape == (0, 20)
    assert torch.equal(linear(x[:, :0], weight[:, :0], bias, backend="cpp"), bias.expand(5, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_form_equals_naive_with_gradients(dtype):
    x, weight, bias = draw(9, 33, 12, dtype)
    assert_as_exact_as_the_sum_allows(linear(x, weight, bias, backend="torch"), x, weight, bias)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: linear(*t, backend="torch"), leaves)


def test_gradients_are_left_to_torch():
    x, weight, bias = draw(3, 8, 4)
    weight.requires_grad_()
    assert linear(x, weight, bias).requires_grad
    with pytest.raises(ValueError, match="gradients are wanted, which only the torch form has"):
        linear(x, weight, bias, backend="cpp")
    with torch.no_grad():
        assert not linear(x, weight, bias, backend="cpp").requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, b: linear(x, w.T), r"weight must be \[N, K\] with x \[..., K\]; got weight \[8, 4\]"),
        (lambda x, w, b: linear(x, w[0]), r"got weight \[8\]"),
        (lambda x, w, b: linear(x, w, b[:1]), r"bias must be \[4\]"),
        (lambda x, w, b: linear(x, w.double(), backend="cpp"), "got float32 and float64"),
        (lambda x, w, b: linear(x.half(), w, backend="cpp"), "got float16 and float32"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw(3, 8, 4))
