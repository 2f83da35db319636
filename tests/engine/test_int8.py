"""Keys and values in int8: an engine's promises hold, and its answers are near those in full precision."""

import pytest
import torch

from opensala.contexts import Context
from opensala.engine import ask
from opensala.model.storage import row_bytes

from ..contexts.files import content
from ..contexts.tools import DENSE_LEN, PARAMS, documents, engine, model, outcome

QUESTIONS = ("what is the code?", "where are the red falcons near the old mill tower?")


def int8(of, **changes):
    return engine(of, kv_dtype="int8", **changes)


@pytest.mark.parametrize("length", [20, DENSE_LEN - 1, DENSE_LEN + 7, 900])
def test_cut_otherwise_or_kept_it_gives_the_same_bits(length, tmp_path):
    of, docs = model(), documents(length)
    wanted = [outcome(ask(int8(of), docs, q, PARAMS, quiet=True)) for q in QUESTIONS]
    other = int8(of, max_batch_tokens=7)
    assert [outcome(ask(other, docs, q, PARAMS, quiet=True)) for q in QUESTIONS] == wanted
    Context.ingest(int8(of), docs, tmp_path / "a.ctx").close()
    Context.ingest(int8(of, max_batch_tokens=13), docs, tmp_path / "b.ctx").close()
    assert content(tmp_path / "a.ctx") == content(tmp_path / "b.ctx")
    with Context.open(int8(of), tmp_path / "a.ctx") as context:
        assert [outcome(context.ask(q, PARAMS)) for q in QUESTIONS] == wanted


def test_answers_are_near_those_in_full_precision():
    """And not the same: the option does something."""
    of, docs = model(), documents(900)
    near = [ask(e, docs, QUESTIONS[0], PARAMS, quiet=True) for e in (engine(of), int8(of))]
    assert near[0].confidence == pytest.approx(near[1].confidence, rel=0.05)
    assert near[0].confidence != near[1].confidence


def test_the_bytes_that_are_reported_are_those_of_eight_bits():
    """A key or value of 8 numbers takes 8 bytes and its scale's 4 instead of 32; the rest stays as it is."""
    of, docs = model(), documents(900)
    full, small = (ask(e, docs, QUESTIONS[0], PARAMS, quiet=True) for e in (engine(of), int8(of)))
    length = full.prompt_tokens + full.new_tokens
    assert small.prompt_tokens + small.new_tokens == length
    sparse = sum(of.config.is_sparse(i) for i in range(of.config.num_hidden_layers))
    saved = 4 * of.config.head_dim - row_bytes(of.config.head_dim, torch.int8)
    rows = 2 * length * sparse * of.config.num_key_value_heads
    assert full.cache_bytes - small.cache_bytes == rows * saved > 0


def test_a_context_is_bound_to_it(tmp_path):
    of, docs = model(), documents(300)
    Context.ingest(int8(of), docs, tmp_path / "a.ctx").close()
    Context.ingest(engine(of), docs, tmp_path / "b.ctx").close()
    for path, where, message in (
        ("a.ctx", engine(of), "kept in kv_dtype int8 in the context and auto here"),
        ("b.ctx", int8(of), "kept in kv_dtype auto in the context and int8 here"),
    ):
        with pytest.raises(ValueError, match=f"made by another model: keys and values are {message}"):
            Context.open(where, tmp_path / path)


def test_it_is_asked_for_rightly():
    with pytest.raises(ValueError, match="kv_dtype must be auto or int8, got 'fp8'"):
        engine(kv_dtype="fp8")
    with pytest.raises(ValueError, match="kv_dtype int8 runs on a CPU only, and this model is on meta"):
        int8(model().to("meta"))
    running = int8(model().bfloat16())
    assert running.storage.kv[0].keys.dtype == torch.int8 and running.storage.kv[0].k1.dtype == torch.bfloat16
