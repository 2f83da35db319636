"""Conversations that a model writes, by the script of docs/corpus.md."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from opensala.engine import shipped_model

from ..convert.test_transfer import make_teacher

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def converse():
    path = Path(__file__).parents[2] / "scripts" / "corpus" / "converse.py"
    spec = importlib.util.spec_from_file_location("converse", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["converse"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A random Llama; with as many special ids as there are, an end comes soon."""
    folder = tmp_path_factory.mktemp("writer")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    tokenizer.chat_template = TEMPLATE
    make_teacher(folder, "llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_conversations_are_written_and_their_answers_marked(converse, writer, tmp_path, monkeypatch):
    monkeypatch.setattr(converse, "QUESTION", 20)
    monkeypatch.setattr(converse, "ANSWER", 60)
    monkeypatch.setattr(converse, "PASSAGE", (20, 40))
    tokenizer = AutoTokenizer.from_pretrained(writer)
    end, real = tokenizer.eos_token_id, converse.AutoModelForCausalLM.from_pretrained

    def eager(*args, **options):
        """It ends an answer sooner or later."""
        model = real(*args, **options)
        plain = model.forward

        def forward(*a, **o):
            out = plain(*a, **o)
            out.logits[..., end] = out.logits.amax(-1) - 1.0
            return out

        model.forward = forward
        return model

    monkeypatch.setattr(converse.AutoModelForCausalLM, "from_pretrained", eager)
    text = np.random.default_rng(0).integers(50, 2000, 4000).astype(np.uint16)
    np.save(tmp_path / "text.npy", text)
    arguments = (str(writer), tmp_path / "text.npy", tmp_path / "tasks", 12, 256, 5, "cpu", 0)
    converse.main(*arguments)
    ids = np.load(tmp_path / "tasks" / "conversations_256.npy")
    marks = np.load(tmp_path / "tasks" / "conversations_256.answers.npy")
    assert ids.shape == marks.shape and ids.shape[1] == 256 and marks.dtype == bool
    assert 0 < marks.sum() < marks.size
    behind = tokenizer("<assistant>", add_special_tokens=False)["input_ids"]
    for row, answered in zip(ids, marks, strict=True):
        starts = np.flatnonzero(answered & ~np.roll(answered, 1))
        ends = np.flatnonzero(answered & ~np.roll(answered, -1))
        for start, stop in zip(starts, ends, strict=True):
            assert row[start - len(behind) : start].tolist() == behind  # an answer stands behind its prompt
            assert row[stop] == end and end not in row[start:stop]  # and goes to its own end
    converse.main(*arguments)
    assert np.array_equal(np.load(tmp_path / "tasks" / "conversations_256.npy"), ids)


def test_answers_without_an_end_and_conversations_that_do_not_fit_are_left_out(converse):
    class Writer(torch.nn.Module):
        device = torch.device("cpu")

        def generate(self, ids, attention_mask, **options):
            assert attention_mask.sum(1).tolist() == [2, 3]
            return torch.cat([ids, torch.tensor([[7, 1, 1], [7, 8, 9]])], 1)

    assert converse.continuations(Writer(), [[4, 5], [4, 5, 6]], 1, 3, 1.0) == [[7], []]
    pairs = [([2] * 5, [3] * 2), ([2] * 300, [3]), ([4] * 4, [5])]
    filler = np.arange(1000, dtype=np.uint16)
    ids, marks = converse.rows_of(pairs, 10, filler, random.Random(0))
    assert (
        ids[0, :7].tolist() == [2] * 5 + [3] * 2
        and marks[0].tolist() == [False] * 5 + [True] * 2 + [False] * 3
    )
    assert ids[1, :5].tolist() == [4] * 4 + [5] and len(ids) == 2


def test_texts_shorter_than_a_row_are_refused(converse, writer, tmp_path):
    np.save(tmp_path / "text.npy", np.arange(50, 150, dtype=np.uint16))
    with pytest.raises(SystemExit, match="has 100 tokens, a row of 256 needs as many"):
        converse.main(str(writer), tmp_path / "text.npy", tmp_path / "tasks", 4, 256, 4, "cpu", 0)
