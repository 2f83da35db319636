"""The divergence of next-token distributions against the plain formulas of it, with its gradient, on every
backend."""

import pytest
import torch
from torch import nn

from opensala.ops import TokenWeights, divergence
from tests.ops.grid import BACKENDS, nothing_waits

ROWS = 7


def draw(vocabulary, scale=3.0):
    g = torch.Generator().manual_seed(vocabulary)
    s, t = (scale * torch.randn(ROWS, vocabulary, generator=g, dtype=torch.float64) for _ in range(2))
    kl, ce = (torch.rand(ROWS, generator=g, dtype=torch.float64) for _ in range(2))
    kl[2], ce[3] = 0, 0
    return s, t, TokenWeights(kl, ce, torch.randint(0, vocabulary, (ROWS,), generator=g))


def plain(s, t, weights):
    """The losses and their gradient by autograd, in float64."""
    s = s.clone().requires_grad_()
    student = s.log_softmax(-1)
    losses = torch.zeros(ROWS, dtype=torch.float64)
    if t is not None:
        teacher = t.log_softmax(-1)
        losses = losses + (teacher.exp() * (teacher - student)).sum(-1) * weights.kl
    if weights.ce is not None:
        losses = losses + nn.functional.nll_loss(student, weights.targets, reduction="none") * weights.ce
    return losses.detach(), torch.autograd.grad(losses.sum(), s)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", ["both", "divergence", "answers"])
@pytest.mark.parametrize("vocabulary", [11, 1000, 5003])
def test_losses_and_gradient(backend, parts, vocabulary):
    s, t, weights = draw(vocabulary)
    t = None if parts == "answers" else t
    weights = TokenWeights(weights.kl) if parts == "divergence" else weights
    losses, gradient = plain(s, t, weights)

    def run(s, t, kl, ce, targets):
        return divergence(
            s.clone(),
            None if t is None else t.clone(),
            TokenWeights(kl, ce, targets),
            gradient=s.dtype,
            backend=backend.name,
        )

    exact = losses if backend.dtype != torch.float64 else losses.float().double()
    got, d = run(*(backend.cast(x) for x in (s, t, *weights)))
    torch.testing.assert_close(got.cpu().double(), exact, atol=1e-5, rtol=1e-5)
    tolerance = 1e-11 if backend.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(d.cpu().double(), gradient, atol=tolerance, rtol=tolerance)
    alone, none = divergence(
        *(None if x is None else backend.cast(x.clone()) for x in (s, t)),
        TokenWeights(*(backend.cast(x) for x in weights)),
        backend=backend.name,
    )
    assert none is None
    torch.testing.assert_close(alone.cpu(), got.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_and_equal_distributions(backend):
    s, t, weights = draw(300, 1e4)
    weights = TokenWeights(backend.cast(weights.kl))
    same, d = divergence(
        backend.cast(s), backend.cast(s.clone()), weights, gradient=backend.dtype, backend=backend.name
    )
    assert same.abs().max() < 1e-2 and d.abs().max() < 1e-5
    far, d = divergence(
        backend.cast(s), backend.cast(t), weights, gradient=backend.dtype, backend=backend.name
    )
    assert torch.isfinite(far).all() and torch.isfinite(d).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bits_are_widened_exactly_and_the_gradient_is_rounded_once(dtype):
    s, t, weights = draw(1003)
    s, t, weights = (
        s.to(dtype),
        t.to(dtype),
        TokenWeights(weights.kl.float(), weights.ce.float(), weights.targets),
    )
    losses, gradient = plain(s.double(), t.double(), TokenWeights(*weights))
    mixed, wide = divergence(s.clone(), t.float(), weights, gradient=torch.float32, backend="cpp")
    got, d = divergence(s, t, weights, gradient=dtype, backend="cpp")
    assert d.dtype == dtype and d.data_ptr() == s.data_ptr()  # in the student's place
    torch.testing.assert_close(got.double(), losses.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide.double(), gradient, atol=1e-6, rtol=1e-5)
    assert torch.equal(d, wide.to(dtype)) and torch.equal(mixed, got)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_what_is_not_a_number_stays_so_and_excluded_words_count_nothing(backend):
    s, t, weights = (x.float() if isinstance(x, torch.Tensor) else x for x in draw(300))
    weights = TokenWeights(torch.ones(ROWS))
    s[1, 7] = t[2, 299] = float("nan")
    losses, _ = divergence(s, t, weights, gradient=torch.float32, backend=backend)
    assert losses.isnan().tolist() == [n in (1, 2) for n in range(ROWS)]


def test_words_that_the_teacher_excludes_add_nothing():
    """With the formula of any other backend 0 * inf is not a number."""
    s, t, weights = draw(300)
    t[:, 5:] = -float("inf")
    weights = TokenWeights(torch.ones(ROWS))
    got, d = divergence(s.float(), t.float(), weights, gradient=torch.float32, backend="cpp")
    losses, gradient = plain(s, t.clamp(min=-1e4), TokenWeights(torch.ones(ROWS)))
    torch.testing.assert_close(got.double(), losses, atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(d.double(), gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.triton
def test_nothing_waits_for_the_gpu():
    case = next(b for b in BACKENDS if b.id == "triton").values[0]
    s, t, weights = draw(300)
    inputs = [case.cast(x) for x in (s, t, *weights)]
    with nothing_waits():
        divergence(*inputs[:2], TokenWeights(*inputs[2:]), gradient=torch.float32, backend="triton")


def test_what_does_not_fit_is_refused():
    s, t, weights = draw(11)
    for arguments, message in (
        ((s, t[:, :5], weights), r"must be logits \[N, V\], got \[7, 11\] and \[7, 5\]"),
        ((s, t, TokenWeights(weights.kl[:3])), r"weights.kl must be \[7\], got \[3\]"),
        ((s, t, TokenWeights(weights.kl, weights.ce)), "come together"),
    ):
        with pytest.raises(ValueError, match=message):
            divergence(*arguments)
