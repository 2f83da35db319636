"""What a completion says that the sparse layers selected is what the selection ops select."""

import numpy as np
import pytest
import torch

from opensala.engine import SamplingParams
from opensala.engine.capture import CallAgain
from opensala.engine.runner import Runner
from opensala.model.attention import SparseMixer
from opensala.ops import select_blocks

from ..conftest import tiny_model
from .test_engine import engine, ids

NEW = 40
WANTED = SamplingParams(max_tokens=NEW, ignore_eos=True, selection=NEW)
PLAIN = SamplingParams(max_tokens=NEW, ignore_eos=True)
PROMPTS = [ids(50), ids(200, 1), ids(20) * 15]


@torch.no_grad()
def by_the_ops(model, tokens, backend):
    """Blocks `[T, Hkv, K]` of each sparse layer, from queries and keys of a forward pass without cache."""
    found, mixers = {}, [m for m in model.modules() if isinstance(m, SparseMixer)]

    def watch(mixer, project):
        def watched(x, layout):
            q, k, v = project(x, layout)
            found[mixer.layer] = select_blocks(q, k, mixer.spec, scale=mixer.scale, backend=backend)[0]
            return q, k, v

        return watched

    for mixer in mixers:
        mixer.project = watch(mixer, mixer.project)
    try:
        model(torch.tensor([tokens]), use_cache=False)
    finally:
        for mixer in mixers:
            del mixer.project
    return found


def runs(model, how):
    running = engine(model, speculate=4 if how == "drafts" else 0)
    if how in ("python", "replayed"):
        running.runner.native.reason = "not wanted"
    if how == "python":
        running.runner.graphs.reason = "not wanted"
    if how == "captured":
        running.runner = Runner(model, running.storage, CallAgain())
    return running


@pytest.mark.parametrize("how", ["one call", "replayed", "python", "captured", "drafts"])
def test_it_is_what_the_ops_select(how):
    """In a batch with a dense sequence and one that does not ask, and with a prompt read in chunks."""
    model = tiny_model()
    running = runs(model, how)
    dense, silent, done = running.generate(PROMPTS, [WANTED, PLAIN, WANTED])
    assert silent.selection == []
    assert len(done.selection) == len(done.tokens) == NEW
    text = [*PROMPTS[2], *done.tokens]
    for backend in ("cpp", "naive"):
        wanted = by_the_ops(tiny_model(), text, backend)
        for number, chosen in enumerate(done.selection):
            assert chosen.position == len(PROMPTS[2]) + number - 1
            assert list(chosen.blocks) == [0, 3]
            for layer, blocks in chosen.blocks.items():
                assert np.array_equal(blocks, wanted[layer][chosen.position].numpy()), (
                    backend,
                    number,
                    layer,
                )
    different = {tuple(b.ravel()) for chosen in done.selection for b in chosen.blocks.values()}
    assert len(different) > NEW // 2, "the layers and the tokens differ in what they select"
    modes = [chosen.blocks is None for chosen in dense.selection]
    assert modes == [len(PROMPTS[0]) + n < 64 for n in range(NEW)], "dense below dense_len"
    assert (running.runner.native.num_steps > 0) == (how not in ("python", "replayed"))
    if how == "drafts":
        assert 0 < done.accepted < done.drafted


def test_it_is_bounded_and_changes_no_answer():
    model = tiny_model()
    plain = engine(model).generate(PROMPTS, PLAIN)
    asked = SamplingParams(max_tokens=NEW, ignore_eos=True, selection=3)
    found = engine(model).generate(PROMPTS, asked)
    assert [(c.tokens, c.logprobs) for c in plain] == [(c.tokens, c.logprobs) for c in found]
    assert [len(c.selection) for c in found] == [3, 3, 3]
    with pytest.raises(ValueError, match="selection must be a whole number"):
        SamplingParams(selection=-1)


def test_only_steps_of_a_request_that_asks_take_anything_from_the_device(monkeypatch):
    model, calls = tiny_model(), []
    running = engine(model)
    monkeypatch.setattr(running.runner, "selected", lambda rows: calls.append(rows) or {})
    running.generate(PROMPTS, PLAIN)
    assert not calls
    running.generate(PROMPTS, SamplingParams(max_tokens=5, ignore_eos=True, selection=2))
    assert sum(map(len, calls)) == 4, "two tokens of two sparse sequences"


def test_layers_on_a_mixed_prefill_chunk_are_kept_only_where_an_answer_begins():
    model = tiny_model()
    running = runs(model, "python")
    running.add(PROMPTS[2], WANTED)
    while any(s.is_reading for s in running.scheduler.sequences()):
        running.step()
        last = not any(s.is_reading for s in running.scheduler.sequences())
        assert (running.runner._chosen is not None) == last
