"""Values as people write them, facts made of them, and conversations about documents."""

import random
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from opensala.data.conversations import NOT_FOUND, TASKS, Conversations, Texts, insert, sentences
from opensala.data.facts import random_facts
from opensala.data.haystack import Haystack
from opensala.data.needles import needle_document
from opensala.data.retrieval import _meaning, hide, mixed_facts, training_sequence
from opensala.data.values import KINDS, MEASURES, in_words, measure
from opensala.data.written import ABSENT, WRITTEN_KINDS, revalued, written_fact, written_facts
from opensala.engine import shipped_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model())


PROSE = [
    " ".join(
        f"On day {n} the {a} keeper of house {m} walked along the northern shore and counted {b} lamps."
        for n, (a, b) in enumerate([("old", "seven"), ("young", "nine"), ("tired", "eleven")] * 20)
    )
    for m in range(5)
]


def test_values_have_many_forms():
    rng = random.Random(0)
    for kind, make in KINDS.items():
        drawn = [make(rng) for _ in range(300)]
        shapes = {re.sub(r"[a-zà-ÿ]+", "a", re.sub(r"\d", "9", value.lower())) for value in drawn}
        assert len(shapes) >= 5 and len(set(drawn)) > 100, kind
        assert all(value == value.strip() and value for value in drawn), kind


def test_measures_bear_the_unit_of_their_kind():
    rng = random.Random(1)
    assert all("kg" not in measure(rng, "voltage") for _ in range(50))
    assert {measure(rng, "voltage").split()[-1] for _ in range(80)} >= {"V", "kV", "volts"}
    assert len(MEASURES) == 11 and in_words(42) == "forty-two" and in_words(13) == "thirteen"


@pytest.mark.parametrize("kind", WRITTEN_KINDS)
def test_a_statement_holds_its_value_and_its_question_does_not(kind):
    rng = random.Random(kind)
    for _ in range(200):
        fact = written_fact(rng, ("granite", "lantern"), kind)
        assert fact.answer.rstrip(".") in fact.statement and fact.kind == kind
        assert fact.answer not in fact.question and "{" not in fact.statement + fact.question
        assert ".." not in fact.statement


def test_questions_do_not_answer_each_other_and_absent_ones_have_no_fact():
    for seed in range(200):
        made = written_facts(random.Random(seed), 8, 6)
        questions = [fact.question for fact in made.facts]
        assert len(made.facts) == 8 and len(made.absent) == 6
        assert all(fact.answer == ABSENT and not fact.statement for fact in made.absent)
        assert not set(questions) & {fact.question for fact in made.absent}
        keys = {(f.kind, re.sub(r"\W", "", f.statement.replace(f.answer, ""))) for f in made.facts}
        assert len(keys) == 8


def test_absent_questions_are_often_near_what_is_there():
    near = 0
    for seed in range(100):
        made = written_facts(random.Random(seed), 6, 1)
        words = set(re.findall(r"\w{5,}", " ".join(fact.question for fact in made.facts)))
        near += len(words & set(re.findall(r"\w{5,}", made.absent[0].question))) >= 1
    assert near > 50


def test_inserted_statements_leave_the_text_as_it_is():
    rng = random.Random(2)
    text = "The first sentence stands here. The second one follows it.\n\nA new paragraph begins. It ends."
    made = insert(rng, text, ["The mill costs 12.50 EUR.", "It was sold on 3 May 1907."])
    rest = made.replace("The mill costs 12.50 EUR.", "").replace("It was sold on 3 May 1907.", "")
    assert rest.split() == text.split()
    assert sentences(text + " " + text) == []  # each stands there twice


def test_texts_are_drawn_in_the_length_asked_for():
    texts, rng = Texts(PROSE), random.Random(3)
    for characters in (300, 2000, 20_000):
        drawn = texts.draw(rng, characters)
        assert 0.6 * characters <= len(drawn) <= characters + 100
    with pytest.raises(ValueError, match="no document"):
        Texts(["", "  "])


@pytest.mark.parametrize("task", TASKS)
def test_conversations_are_about_their_text(task):
    made = Conversations(Texts(PROSE), "s")
    for number in range(60):
        talk = made.conversation(number, 3000, task)
        assert [m["role"] for m in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
        text = talk.messages[0]["content"]
        for question, answer in zip(talk.messages[::2], talk.messages[1::2], strict=True):
            if task in ("values", "passages", "keys") and answer["content"] != NOT_FOUND:
                assert answer["content"].rstrip(".") in text or answer["content"][1:] in text
                assert question["content"]
        assert len(text) < 4500


def test_conversations_repeat_by_number_and_differ_by_seed():
    texts = Texts(PROSE)
    one, other = Conversations(texts, "a"), Conversations(texts, "b")
    assert one.conversation(7, 2000) == Conversations(texts, "a").conversation(7, 2000)
    assert one.conversation(7, 2000) != other.conversation(7, 2000)
    assert {one.conversation(n, 2000).task for n in range(200)} == set(TASKS)
    with pytest.raises(ValueError, match="tasks must be of values"):
        Conversations(texts, "a", ["riddles"])


def test_about_a_fifth_of_the_questions_has_no_answer():
    made = Conversations(Texts(PROSE), "s", ["values"])
    answers = [
        m["content"]
        for n in range(200)
        for m in made.conversation(n, 4000).messages
        if m["role"] == "assistant"
    ]
    assert 0.12 < sum(answer == NOT_FOUND for answer in answers) / len(answers) < 0.3


def test_another_value_in_the_same_words():
    rng = random.Random(4)
    for fact in random_facts(rng, 300, ["granite", "lantern"]):
        new = revalued(rng, fact)
        before, _, after = fact.statement.rpartition(fact.answer)
        assert new.statement in (before + new.answer + after, before + new.answer + after.removeprefix("."))
        assert new.question == fact.question and new.kind in WRITTEN_KINDS and ".." not in new.statement


def test_absent_questions_of_both_wordings_have_no_fact():
    same = {_meaning(f"{asked}?") for asked in ("What is the code for Ada", "Who is the code of the Ada")}
    assert same == {_meaning("What is Ada's code?")} != {_meaning("What is Ada's key?")}
    plain = 0
    for seed in range(100):
        facts, missing = mixed_facts(random.Random(seed), 12, [], written=0.5, absent=0.5)
        assert not {_meaning(f.question) for f in missing} & {_meaning(f.question) for f in facts}
        assert all(f.answer == ABSENT and not f.statement for f in missing)
        plain += sum(not f.kind for f in missing)
    assert plain > 100


def test_facts_stand_between_sentences_if_they_shall(tokenizer):
    hay = np.array(tokenizer("One day. Two days. Three " * 40, add_special_tokens=False)["input_ids"])
    text = tokenizer.decode(hide(tokenizer, random.Random(0), hay, [" @ "] * 60, between=1.0))
    assert "".join(re.findall(r"[.](?: @)+", text)).count("@") == 60
    assert not re.search(r"@  ", text)  # the text brings the white space that follows
    assert "day @" in tokenizer.decode(hide(tokenizer, random.Random(0), hay, [" @ "] * 60))


def test_sequences_and_needles_of_written_values(tokenizer):
    haystack = Haystack(tokenizer, 20_000, texts=PROSE)
    sequence = training_sequence(tokenizer, haystack, random.Random(0), 2048, 10, written=1.0, absent=1.0)
    answers = "".join(tokenizer.decode(sequence.ids[sequence.answer])).split(tokenizer.eos_token)
    assert len(sequence.ids) == 2048 and 7 <= sum(a.strip() == ABSENT for a in answers) <= 10
    assert [a.strip() for a in answers if a.strip()] == [fact.answer for fact in sequence.asked]
    facts, missing = mixed_facts(random.Random(1), 400, [], written=0.5, absent=0.25)
    assert len(facts) == 400 and 150 < sum(bool(f.kind) for f in facts) < 250 and 60 < len(missing) < 140
    assert mixed_facts(random.Random(2), 9, []) == (random_facts(random.Random(2), 9), [])  # as before
    made = needle_document(tokenizer, " ".join(PROSE), 3000, 5, random.Random(3), written=True)
    text = tokenizer.decode(made.ids)
    assert all(trial.fact.kind and trial.fact.statement in text for trial in made.trials)
