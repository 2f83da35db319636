"""The loss of distillation in pieces of the tokens: divergences and cross-entropies, each token weighted."""

import pytest
import torch
from torch import nn

from opensala.convert.config import Phase
from opensala.convert.distill import token_weights
from opensala.convert.kl import TokenWeights, distillation_loss
from opensala.convert.tokens import Sample


def plain(s, ws, t, wt, weights):
    """The same written out, in float64."""
    student = (s.double() @ ws.double().T).log_softmax(-1)
    teacher = (t.double() @ wt.double().T).log_softmax(-1)
    total = ((teacher.exp() * (teacher - student)).sum(-1) * weights.kl.double()).sum()
    if weights.ce is not None:
        chosen = nn.functional.nll_loss(student, weights.targets, reduction="none")
        total = total + (chosen * weights.ce.double()).sum()
    return total


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    s, ws = (torch.randn(n, 12, generator=g, requires_grad=True) for n in (23, 101))
    t, wt = (torch.randn(n, 16, generator=g) for n in (23, 101))
    kl, ce = torch.rand(23, generator=g), torch.rand(23, generator=g) * (torch.rand(23, generator=g) > 0.5)
    targets = torch.randint(0, 101, (23,), generator=g)
    return s, ws, t, wt, TokenWeights(kl, ce, targets)


@pytest.mark.parametrize("rows", [None, 1, 7, 23, 100])
@pytest.mark.parametrize("with_answers", [True, False])
def test_pieces_give_the_plain_loss_and_its_gradients(tensors, rows, with_answers):
    s, ws, t, wt, weights = tensors
    weights = weights if with_answers else TokenWeights(weights.kl)
    got, expected = distillation_loss(s, ws, t, wt, weights, rows), plain(s, ws, t, wt, weights)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(3 * got, (s, ws)), torch.autograd.grad(3 * expected, (s, ws)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_without_a_teacher_only_answers_count(tensors):
    s, ws, t, wt, weights = tensors
    got = distillation_loss(s, ws, None, None, weights, 5)
    expected = plain(s, ws, t, wt, weights) - plain(s, ws, t, wt, TokenWeights(weights.kl))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(got, (s, ws)), torch.autograd.grad(expected, (s, ws)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_products_may_be_bfloat16(tensors):
    s, ws, t, wt, weights = tensors
    frozen = ws.detach()
    exact = torch.autograd.grad(distillation_loss(s, frozen, t, wt, weights), s)[0]
    low = s.detach().bfloat16().requires_grad_()
    rough = torch.autograd.grad(distillation_loss(low, frozen, t.bfloat16(), wt, weights), low)[0]
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


def test_answers_weigh_on_the_tokens_that_predict_them():
    ids = torch.arange(8).view(2, 4)
    answers = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    phase = Phase(1, 2, 1e-3, 1e-4, answer_weight=3.0, cross_entropy=0.5)
    weights = token_weights(Sample(ids, answers), phase)
    assert weights.kl.tolist() == [1, 3, 3, 1, 1, 1, 1, 1]
    assert weights.ce.tolist() == [0, 0.5, 0.5, 0, 0, 0, 0, 0]
    assert weights.targets[1:3].tolist() == [2, 3]
    assert token_weights(Sample(ids), phase).kl.tolist() == [1] * 8
