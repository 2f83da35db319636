"""Losses: the weighting, and that alignment makes a compressed key findable."""

import pytest
import torch

from opensala.model.layout import rows_layout
from opensala.ops import compress_keys
from opensala.train.loss import (
    IGNORED,
    chunked_cross_entropy,
    selection_alignment_loss,
    weighted_next_token_loss,
)

from ..conftest import tiny_model
from ..model.test_equality import tokens


def test_weighted_loss_is_cross_entropy_on_the_weighted_targets():
    logits, ids = torch.randn(2, 9, 50), tokens(9, batch=2) % 50
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(weighted_next_token_loss(logits, ids, torch.ones(2, 9)), plain)
    weights = torch.zeros(2, 9)
    weights[1, 4] = 0.3
    one = torch.nn.functional.cross_entropy(logits[1, 3:4], ids[1, 4:5])
    torch.testing.assert_close(weighted_next_token_loss(logits, ids, weights), one)


def test_alignment_raises_the_rank_of_the_attended_window():
    torch.manual_seed(0)
    mixer = tiny_model().model.layers[0].self_attn
    x = torch.randn(3, 200, 32)
    queries = torch.tensor([[0, 199], [1, 180], [2, 199]])
    documents = torch.tensor([150, 150, 150])
    optimizer = torch.optim.Adam([mixer.q_proj.weight, mixer.k_proj.weight], lr=1e-2)
    first = selection_alignment_loss(mixer, x, queries, documents)
    for _ in range(60):
        optimizer.zero_grad()
        loss = selection_alignment_loss(mixer, x, queries, documents)
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first
    with torch.no_grad():
        q, k, _ = mixer.project(x, rows_layout((3, 200), None, [False] * 3, x.device))
        scores = torch.einsum("hd,wd->hw", q[0, 199, :2], compress_keys(k, 8, 4)[0, :36, 0])
        dense = torch.einsum("hd,td->ht", q[0, 199, :2] * mixer.scale, k[0, :150, 0]).softmax(-1)
    for h in range(2):
        assert abs(scores[h].argmax() * 4 + 4 - dense[h].argmax()) <= 8


def test_only_windows_inside_the_document_count():
    torch.manual_seed(1)
    model = tiny_model(
        num_attention_heads=1, num_key_value_heads=1
    )  # one head: the attention mass as weight cancels
    mixer, x, ends = model.model.layers[0].self_attn, torch.randn(2, 200, 32), torch.tensor([150, 150])
    changed = x.clone()
    changed[0, 150:199] += (
        1.0  # between the document and the query: a window that reaches in there must not matter
    )
    query = torch.tensor([[0, 199]])
    torch.testing.assert_close(
        selection_alignment_loss(mixer, changed, query, ends), selection_alignment_loss(mixer, x, query, ends)
    )


def test_no_gradient_reaches_values_or_teacher():
    mixer = tiny_model().model.layers[0].self_attn
    selection_alignment_loss(
        mixer, torch.randn(2, 100, 32), torch.tensor([[0, 99]]), torch.tensor([80, 80])
    ).backward()
    assert (
        mixer.v_proj.weight.grad is None
        and mixer.o_gate.weight.grad is None
        and mixer.k_proj.weight.grad.abs().sum() > 0
    )


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_chunked_cross_entropy_is_cross_entropy_with_its_gradients(rows):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(50, 24, dtype=torch.float64, requires_grad=True),
        torch.randn(91, 24, dtype=torch.float64, requires_grad=True),
    )
    targets = torch.randint(0, 91, (50,))
    targets[[0, 13, 49]] = IGNORED
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    got = chunked_cross_entropy(hidden, weight, targets, rows)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(
        torch.autograd.grad(3.7 * got, (hidden, weight)),
        torch.autograd.grad(3.7 * wanted, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets, rows), wanted)
    (only,) = torch.autograd.grad(chunked_cross_entropy(hidden.detach(), weight, targets, rows), (weight,))
    torch.testing.assert_close(
        only,
        torch.autograd.grad(
            torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum"), (weight,)
        )[0],
    )


def test_chunked_cross_entropy_never_holds_all_logits(monkeypatch):
    """The largest product seen has the rows of one chunk."""
    seen = []
    original = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch, "logsumexp", lambda x, *a, **k: seen.append(x.shape[0]) or original(x, *a, **k)
    )
    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.zeros(100, dtype=torch.long), 16).backward()
    assert max(seen) == 16 and sum(seen) == 100
    with pytest.raises(ValueError, match="hidden must be"):
        chunked_cross_entropy(hidden[None], weight, torch.zeros(100, dtype=torch.long))


def test_chunked_cross_entropy_of_bfloat16_keeps_float32_sums():
    hidden, weight = (
        torch.randn(300, 16).bfloat16().requires_grad_(),
        torch.randn(40, 16).bfloat16().requires_grad_(),
    )
    targets = torch.randint(0, 40, (300,))
    got = chunked_cross_entropy(hidden, weight, targets, 64)
    wanted = torch.nn.functional.cross_entropy((hidden.float() @ weight.float().T), targets, reduction="sum")
    assert got.dtype == torch.float32 and abs(got - wanted) / wanted < 5e-3
    got.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
