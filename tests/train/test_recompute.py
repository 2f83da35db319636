"""Recomputed layers give the gradients of the pass whose loss was taken, with the blocks that pass
selected."""

import pytest
import torch

import opensala.model.attention as attention
from opensala.train.steps import _row_loss, recompute_layers

from ..conftest import tiny_model
from ..model.test_equality import tokens


def gradients(model, ids, bounds):
    model.zero_grad()
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    loss = _row_loss(model, input_ids=ids, targets=targets, cu_seqlens=torch.tensor(bounds))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture
def model():
    return tiny_model(attention_mode="sparse").double().train()


def test_gradients_are_those_of_a_pass_that_keeps_everything(model):
    ids, bounds = tokens(400), [0, 150, 151, 400]
    wanted = gradients(model, ids, bounds)
    recompute_layers(model)
    for got, want in zip(gradients(model, ids, bounds), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_selection_is_kept_not_made_again(model, monkeypatch):
    """A selection that comes out otherwise at every call: once a layer and document, and the gradient belongs
    to the first."""
    select, calls = attention.select_blocks, []

    def fickle(q, k, spec, **options):
        calls.append(q.shape[1])
        blocks = select(q, k, spec, **options)
        if len(calls) % 2 == 0:  # leave out the oldest chosen block wherever there are others
            blocks = (
                torch.where((blocks[..., 1:2] >= 0) & (torch.arange(blocks.shape[-1]) == 0), -1, blocks)
                .sort(-1, descending=True)
                .values
            )
            blocks = torch.where(blocks < 0, torch.iinfo(torch.int32).max, blocks).sort(-1).values
            blocks = torch.where(blocks == torch.iinfo(torch.int32).max, -1, blocks)
        return blocks

    monkeypatch.setattr(attention, "select_blocks", fickle)
    ids, bounds = tokens(300), [0, 300]
    wanted = gradients(model, ids, bounds)
    assert len(calls) == 2
    calls.clear()
    recompute_layers(model)
    got = gradients(model, ids, bounds)
    assert len(calls) == 2  # the recomputed passes did not select
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
