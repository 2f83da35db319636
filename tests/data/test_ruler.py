"""RULER's task types: lengths within 1%, answers in the text, the same documents for the same seed."""

import re

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opensala.data.prompts import PromptFormat
from opensala.data.ruler import TASKS, fit_document, ruler_task
from opensala.data.ruler.filler import filler, place
from opensala.data.ruler.types import RulerDocument, RulerQuestion
from opensala.engine import shipped_model


@pytest.fixture(scope="module")
def form():
    return PromptFormat(AutoTokenizer.from_pretrained(str(shipped_model())))


@pytest.mark.parametrize("length", [1024, 4096, 30_000])
@pytest.mark.parametrize("name", TASKS)
def test_length_with_budget_is_within_one_percent(form, name, length):
    for index in range(3):
        fitted = ruler_task(name).document(length, form, index=index)
        longest = max(map(len, fitted.prompts)) + TASKS[name].budget
        assert 0.99 * length <= longest == fitted.length <= length


def test_lists_of_words_have_every_length(form):
    """Long lists repeat their words more often than short ones: a jump in length, with lists between."""
    for length in range(2500, 7500, 250):
        assert 0.99 * length <= ruler_task("cwe").document(length, form).length <= length


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_document(form, name):
    task = ruler_task(name)
    one, two, other = (task.document(2048, form, index=1, seed=seed) for seed in (5, 5, 6))
    assert one == two and one.document.text != other.document.text
    assert task.document(2048, form, index=2, seed=5).document.text != one.document.text


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("cwe", "fwe")])
def test_answers_stand_in_the_text_where_the_depth_says(form, name):
    for index in range(4):
        document = ruler_task(name).document(8192, form, index=index, questions=3).document
        assert len(document.questions) == 3 and len({q.text for q in document.questions}) == 3
        for question in document.questions:
            for reference in question.references:
                assert re.search(rf"\b{re.escape(reference)}\b", document.text)
            if question.depth is not None:
                found = [
                    m.start() / len(document.text)
                    for m in re.finditer(re.escape(question.references[0]), document.text)
                ]
                assert min(abs(f - question.depth) for f in found) < 0.06, (question, found)


def test_one_statement_for_each_value(form):
    """Asked values are stated once; keys that were not asked for have values of their own."""
    document = ruler_task("niah_multikey_1").document(4096, form).document
    assert len(re.findall(r"The [\w ]+ for \S+ is \d{7}\.", document.text)) == 4
    document = ruler_task("niah_multivalue").document(4096, form).document
    key = re.search(r"for (\S+)\?", document.questions[0].text).group(1)
    assert set(re.findall(rf"for {key} is (\d+)\.", document.text)) == set(document.questions[0].references)
    document = ruler_task("niah_multikey_2").document(4096, form).document
    statements = re.findall(r"The [\w ]+ for (\S+) is (\d+)\.", document.text)
    assert len(statements) > 60 and len({k for k, _ in statements}) == len({v for _, v in statements}) == len(
        statements
    )


def test_variables_are_set_in_order(form):
    document = ruler_task("vt").document(4096, form, questions=2).document
    for question in document.questions:
        value = re.search(r"value (\d{5})", question.text).group(1)
        found = [
            name
            for name, source in re.findall(r"Set (\w{5}) to (?:the value of )?(\w+)\.", document.text)
            if source == value or source in question.references
        ]
        assert tuple(found) == question.references


def test_common_and_frequent_words_are_the_most_common(form):
    from collections import Counter

    for length in (2048, 8192):
        document = ruler_task("cwe").document(length, form).document
        counts = Counter(re.findall(r"\d+\. (\w+)", document.text.split("Now the list")[1])).most_common()
        assert {w for w, _ in counts[:10]} == set(document.questions[0].references)
        assert counts[9][1] >= 2 * counts[10][1]
        document = ruler_task("fwe").document(length, form).document
        counts = Counter(document.text.split("\n\n")[1].split()).most_common()
        assert tuple(w for w, _ in counts[:4]) == (".....", *document.questions[0].references)
        assert counts[3][1] > counts[4][1]


def test_two_hops_need_two_entries(form):
    document = ruler_task("qa_2").document(4096, form).document
    company = re.search(r"founder of (.+) born", document.questions[0].text).group(1)
    founder = re.search(rf"{company} is a maker.*by\s(\w+ \w+) and", document.text).group(1)
    assert f"{founder} was born in {document.questions[0].references[0]} " in document.text
    assert company not in next(e for e in document.text.split("\n\n") if f"{founder} was born" in e)


def test_words_are_counted_exactly_and_statements_keep_their_depth():
    import random

    for kind in ("noise", "essay"):
        for words in (1, 7, 500):
            assert len(" ".join(filler(kind, words, random.Random(0))).split()) == words
    text = place(["a b c."] * 50, ["FIRST", "LAST"], [0.0, 1.0])
    assert text.startswith("FIRST a b c.") and "LAST a b c." in text[-12:]


def test_a_length_that_cannot_be_hit(form):
    with pytest.raises(ValueError, match=r"niah_single_1: length 100 is too short.*at least that"):
        ruler_task("niah_single_1").document(100, form)
    with pytest.raises(ValueError, match="cannot be hit within 1%.*neighbouring documents take"):
        fit_document(
            lambda size: RulerDocument("word " * 1000 * size, (RulerQuestion("?", ("a",)),)), 4500, 10, form
        )


def test_unknown_task():
    with pytest.raises(ValueError, match="did you mean niah_single_1"):
        ruler_task("niah_singel_1")
    with pytest.raises(ValueError, match="questions must be at least 1, got 0"):
        ruler_task("vt").document(4096, None, questions=0)


def test_chat_templates_count(form):
    """With a template the question is a user message, and the template's tokens are part of the length."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(shipped_model()))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}{% if "
        "add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = PromptFormat(tokenizer)
    fitted = ruler_task("niah_single_1").document(2048, chat)
    text = tokenizer.decode(fitted.prompts[0])
    assert (
        text.startswith("[user]")
        and text.endswith("[end][assistant]")
        and 0.99 * 2048 <= fitted.length <= 2048
    )
    assert PromptFormat(tokenizer, chat=False).question("D", "Q?") == "D\n\nQuestion: Q?\nAnswer:"
    with pytest.raises(ValueError, match="no chat template"):
        PromptFormat(form.tokenizer, chat=True)
