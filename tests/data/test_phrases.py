"""Facts in sentences put together from parts, facts made of real sentences, and both hidden in prose."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from opensala.data.borrowed import borrowed_fact, near_miss
from opensala.data.conversations import Texts
from opensala.data.haystack import Haystack
from opensala.data.phrases import VERBS, openings, phrased_facts, plural, with_articles
from opensala.data.retrieval import _meaning, hide_in_prose, mixed_facts, training_sequence
from opensala.data.written import ABSENT, WRITTEN_KINDS
from opensala.engine import shipped_model

MEASURED = Path(__file__).parents[2] / "benchmarks" / "written_facts.jsonl"
WORDS = ["granite", "lantern", "weathered", "almanac"]
PROSE = [
    f"The {a} keeper of the lighthouse walked along the northern shore before breakfast. He had spoken "
    f"with the {b} captain about the repairs of the harbour wall. Nobody in the village was surprised by the "
    f"{a} news."
    for a in ("old", "young", "tired", "merry")
    for b in ("seventh", "retired", "Danish", "younger")
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def texts():
    return Texts([" ".join(PROSE[n:] + PROSE[:n]) for n in range(4)])


def test_phrased_statements_hold_their_values_and_their_questions_do_not():
    for seed in range(60):
        facts = phrased_facts(random.Random(seed), 12, WORDS)
        assert len(facts) == 12 == len({fact.question for fact in facts})
        for fact in facts:
            assert fact.answer in fact.statement and fact.answer not in fact.question
            assert fact.kind in WRITTEN_KINDS and "{" not in fact.statement + fact.question
            assert ".." not in fact.statement and fact.statement[0] == fact.statement[0].upper()
            assert not re.search(r"\ba [aeiou]", fact.question)


def test_hardly_any_wording_is_seen_twice():
    facts = [f for seed in range(80) for f in phrased_facts(random.Random(seed), 10)]
    wordings = {f.statement.replace(f.answer, "@") for f in facts}
    assert len(wordings) > 790 and len({f.question for f in facts}) > 780
    assert len({v[0] for v in VERBS}) == len(VERBS) > 180
    assert {len(verb) for verb in VERBS} == {4}


def test_phrased_questions_keep_the_words_that_tell_which_fact_they_ask_for():
    for fact in phrased_facts(random.Random(0), 200, WORDS):
        if fact.question.startswith(("Who ", "By whom ")):
            continue
        asked = set(re.findall(r"[A-Z]?[a-z]{4,}", fact.question.split(" ", 1)[1]))
        said = fact.statement.lower()
        missing = {w for w in asked if w.lower()[:3] not in said and w.lower() not in openings_words()}
        assert len(missing) <= 1, (fact, missing)  # the base form of an irregular verb


def openings_words():
    return {w.lower() for kind in WRITTEN_KINDS for o in openings(kind) for w in o.split()} | {"does", "have"}


def test_inflection():
    forms = {verb[0]: verb for verb in VERBS}
    assert forms["carry"] == ("carry", "carries", "carried", "carried")
    assert forms["reach"][1:] == ("reaches", "reached", "reached") and forms["lease"][2] == "leased"
    assert forms["write"][1:] == ("writes", "wrote", "written")
    assert [plural(n) for n in ("leaf", "valley", "library", "torch")] == [
        "leaves",
        "valleys",
        "libraries",
        "torches",
    ]
    assert with_articles("A apple on a oak by a mill") == "An apple on an oak by a mill"


@pytest.mark.parametrize("kind", WRITTEN_KINDS)
def test_borrowed_sentences_hold_the_value_and_lend_their_words_to_the_question(texts, kind):
    rng, made = random.Random(kind), 0
    for _ in range(40):
        fact = borrowed_fact(rng, texts, kind)
        if fact is None:
            continue
        made += 1
        assert fact.answer.rstrip(".") in fact.statement and fact.kind == kind
        assert fact.answer not in fact.question and fact.question.startswith(openings(kind))
        shared = set(re.findall(r"\w{4,}", fact.question.lower()))
        assert sum(word[:4] in fact.statement.lower() for word in shared) >= 2
    assert made > 30


def test_texts_without_a_fitting_sentence_lend_nothing():
    assert borrowed_fact(random.Random(0), Texts(["Short. Too short. No. " * 30])) is None


@pytest.mark.parametrize(
    "question",
    [
        "What is the access code for the north gate?",
        "What is the value of MIN_RETRY_COUNT?",
        "What is blue-falcon's serial number?",
        "Who is the captain of Silver Heron?",
        "What is the special magic number for otter mentioned in the provided text?",
    ],
)
def test_near_misses_differ_in_one_word_that_tells_what_is_asked(question):
    seen = set()
    for seed in range(60):
        missed = near_miss(random.Random(seed), question, WORDS)
        old, new = re.findall(r"[A-Za-z]+", question), re.findall(r"[A-Za-z]+", missed)
        changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert len(changed) == 1
        (a, b) = changed[0]
        assert a.lower() not in ("what", "who", "value", "the", "code", "number", "mentioned", "provided")
        assert (a.isupper(), a[0].isupper()) == (b.isupper(), b[0].isupper())
        seen.add(a)
    assert len(seen) >= 1 and near_miss(random.Random(0), "What is it?", WORDS) is None


def test_prose_is_tokenized_with_its_facts_as_one_text(tokenizer, texts):
    said = ["The mill costs $1,250.", "MAX_RETRY_COUNT = 512", "It opens at 6:30 a.m."]
    for length in (60, 200, 511, 2000):
        ids = hide_in_prose(tokenizer, random.Random(length), texts, length, said)
        text = tokenizer.decode(ids)
        assert len(ids) == length and all(statement in text for statement in said)
    on_lines = 0
    for seed in range(12):
        text = tokenizer.decode(hide_in_prose(tokenizer, random.Random(seed), texts, 3000, said * 20))
        # What follows a statement is a new sentence or line, right behind one white space.
        assert all(re.match(r" [A-Z]| ?\n+\s*\S|\s*$", rest) for rest in text.split("$1,250.")[1:])
        on_lines += text.splitlines().count("The mill costs $1,250.") >= 19
    assert 0 < on_lines < 12, "some texts have each statement on a line of its own, some do not"
    with pytest.raises(ValueError, match="the statements need"):
        hide_in_prose(tokenizer, random.Random(0), texts, 20, said)


def test_sequences_hide_their_facts_in_prose(tokenizer, texts):
    haystack = Haystack(tokenizer, 20_000, texts=PROSE)
    for seed in range(12):
        made = training_sequence(
            tokenizer, haystack, random.Random(seed), 1500, 8, written=0.7, absent=0.5, prose=texts
        )
        whole = tokenizer.decode(made.ids)
        document = whole[: whole.index("\n\nQuestion:")]
        answers = "".join(tokenizer.decode(made.ids[made.answer])).split(tokenizer.eos_token)
        assert len(made.ids) == 1500 and made.answer.dtype == bool
        assert [a.strip() for a in answers if a.strip()] == [fact.answer for fact in made.asked]
        for fact in made.asked:
            assert (fact.answer == ABSENT) == (fact.statement == "")
            assert not fact.statement or fact.statement in document


def test_half_of_the_absent_questions_are_a_stated_one_but_for_a_word(texts):
    near = total = 0
    for seed in range(60):
        facts, missing = mixed_facts(random.Random(seed), 10, WORDS, written=0.6, absent=0.4, texts=texts)
        stated = [set(f.question.split()) for f in facts]
        assert not {_meaning(f.question) for f in missing} & {_meaning(f.question) for f in facts}
        near += sum(any(len(set(f.question.split()) - words) <= 1 for words in stated) for f in missing)
        total += len(missing)
    assert 0.4 < near / total < 0.8 and total > 150


def test_what_is_measured_is_not_trained_on():
    """Neither the facts nor the verbs of the sentences that are in nobody's words but their own."""
    measured = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]
    said = {entry["statement"] for entry in measured if entry["statement"]}
    asked = {entry["question"] for entry in measured}
    unseen = {"conduct", "exceed", "catalogue", "approve", "ripen", "handle", "vote", "estimate", "follow"}
    assert not unseen & {verb[0] for verb in VERBS}
    for seed in range(150):
        facts, missing = mixed_facts(random.Random(seed), 12, WORDS, written=0.7, absent=0.5)
        assert not {fact.statement for fact in facts} & said
        assert not {fact.question for fact in (*facts, *missing)} & asked


def test_white_space_is_left_out_where_the_text_brings_its_own(tokenizer):
    haystack = Haystack(tokenizer, 20_000, texts=PROSE)
    for seed in range(40):
        made = training_sequence(tokenizer, haystack, random.Random(seed), 700, 4, written=0.5, absent=0.2)
        assert len(made.ids) == 700
        assert isinstance(made.ids, np.ndarray)
