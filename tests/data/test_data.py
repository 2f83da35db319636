"""The generators: facts that agree with their questions, sequences of the asked length, documents with known
depths."""

import random
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from opensala.data.facts import format_question, random_fact, random_facts
from opensala.data.haystack import Haystack
from opensala.data.needles import needle_document
from opensala.data.retrieval import training_sequence
from opensala.data.text import KINDS, documents, long_document
from opensala.engine import shipped_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(tokenizer, characters=200_000)


def test_questions_repeat_the_words_of_their_fact():
    rng = random.Random(0)
    for fact in (random_fact(rng) for _ in range(500)):
        assert fact.answer in fact.statement and fact.answer not in fact.question
        subject = fact.statement.split(fact.answer)[0]
        words = set(re.findall(r"\w+", fact.question)) - {
            "What",
            "Who",
            "is",
            "the",
            "of",
            "value",
            "mentioned",
            "in",
            "provided",
            "text",
        }
        assert words <= set(re.findall(r"\w+", subject)) | {"number"}, fact


def test_facts_of_one_call_have_different_questions():
    rng = random.Random(1)
    for _ in range(50):
        facts = random_facts(rng, 20)
        assert len({f.question.lower().replace(" for ", " of ") for f in facts}) == 20


def test_facts_differ_by_seed_and_repeat_with_it():
    assert (
        random_facts(random.Random(3), 5)
        == random_facts(random.Random(3), 5)
        != random_facts(random.Random(4), 5)
    )


@pytest.mark.parametrize("length", [400, 777, 2048])
def test_training_sequences(tokenizer, haystack, length):
    for seed in range(5):
        sequence = training_sequence(tokenizer, haystack, random.Random(seed), length, 3)
        assert sequence.ids.shape == sequence.answer.shape == (length,)
        assert sequence.ids[0] == tokenizer.bos_token_id and sequence.ids.max() < len(tokenizer)
        text = tokenizer.decode(sequence.ids.tolist())
        answers = tokenizer.decode(sequence.ids[sequence.answer].tolist()).split("</s>")[:-1]
        assert len(answers) == 3
        document = text[: text.index("\n\nQuestion: ")]
        assert all(answer.strip() in document for answer in answers)


def test_too_many_facts_for_a_sequence_are_refused(tokenizer, haystack):
    with pytest.raises(ValueError, match="9 facts need"):
        training_sequence(tokenizer, haystack, random.Random(0), 100, 9)


def test_every_kind_of_haystack_gives_the_asked_length(tokenizer, haystack):
    rng = random.Random(0)
    spans = [haystack.span(rng, 300) for _ in range(60)]
    assert all(len(s) == 300 and s.dtype == np.int32 for s in spans)


def test_needle_documents_hold_their_facts_at_the_stated_depths(tokenizer):
    text = long_document(60_000, seed=1)
    document = needle_document(tokenizer, text, 8000, 5, random.Random(0))
    assert abs(len(document.ids) - 8000) < 800
    decoded = tokenizer.decode(document.ids)
    for n, trial in enumerate(document.trials):
        assert n / 5 - 0.05 <= trial.depth <= (n + 1) / 5
        place = decoded.index(trial.fact.statement) / len(decoded)
        assert abs(place - trial.depth) < 0.05
        assert tokenizer.decode(trial.question) == format_question(trial.fact.question)
    with pytest.raises(ValueError, match="100,000 are needed"):
        needle_document(tokenizer, text, 100_000, 5, random.Random(0))


def test_text_of_this_installation():
    assert all(next(iter(documents(kind))).strip() for kind in KINDS if kind != "headers")
    assert len(long_document(50_000, seed=0)) == 50_000 and long_document(5000, seed=0) != long_document(
        5000, seed=1
    )
    with pytest.raises(ValueError, match="kind must be one of"):
        next(iter(documents("novels")))


def test_held_out_texts_are_apart():
    from opensala.data.text import documents

    everything, train, held = (list(documents("headers", part)) for part in ("all", "train", "held_out"))
    assert len(train) + len(held) == len(everything) and 0.04 < len(held) / len(everything) < 0.12
    assert (
        not set(map(id, train)) & set(map(id, held))
        and everything[:11] == train[:11]
        and everything[11] == held[0]
    )
    with pytest.raises(ValueError, match="part must be one of all, train, held_out, got 'test'"):
        next(documents("code", "test"))


def test_packed_text_is_cut_evenly_and_drawn_by_position(tokenizer, monkeypatch):
    from opensala.data.packing import PackedText

    texts = [f"Document {n} has its own few words and the number {n * 7919}." for n in range(60)]
    packed = PackedText(tokenizer, texts, 40)
    flat = [
        t
        for text in texts
        for t in (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]
    assert packed.rows.flatten().tolist() == flat[: len(packed) * 40] and len(packed) == len(flat) // 40
    whole = packed.draw(3, 0, 2 * len(packed))
    assert sorted(map(tuple, whole[: len(packed)])) == sorted(
        map(tuple, packed.rows)
    )  # an epoch is every sequence once
    assert (packed.draw(3, 5, 4) == whole[5:9]).all() and (
        packed.draw(4, 0, len(packed)) != whole[: len(packed)]
    ).any()
    monkeypatch.setattr("opensala.data.packing.random.Random", lambda _: pytest.fail("shuffled anew"))
    for step in range(3):  # within an epoch an order is made once
        assert (packed.draw(4, step, 1) == packed.draw(4, 0, len(packed))[step : step + 1]).all()
    with pytest.raises(ValueError, match="notes has .* tokens, one sequence needs 400: give more text"):
        PackedText(tokenizer, texts[:1], 400, "notes")


def test_sequences_for_a_tokenizer_without_bos(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    sequence = training_sequence(
        bare, Haystack(bare, texts=["Some words to hide facts in. " * 400]), random.Random(0), 300, 3
    )
    assert len(sequence.ids) == len(sequence.answer) == 300 and sequence.ids[0] != tokenizer.bos_token_id
