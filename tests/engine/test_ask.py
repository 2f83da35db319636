"""Asking: one builder of prompts for what users get and what is scored, and where an answer ends."""

import sys

import pytest

from opensala.data.facts import format_question
from opensala.data.prompts import NEXT_QUESTION, PromptFormat
from opensala.engine import Document, EngineOptions, SamplingParams, ask, build_prompt, load_engine
from opensala.engine import engine as engine_module
from opensala.engine.ask import DOUBTFUL
from opensala.engine.detokenize import Detokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>"
    "{% endif %}"
)
TEXT, QUESTION = "The access code for old-mill is 90217.", "What is the access code for old-mill?"


@pytest.fixture
def engine():
    return load_engine(options=EngineOptions(max_cached_tokens=4000))


@pytest.mark.parametrize("template", [None, CHAT])
def test_what_users_ask_is_what_is_scored(engine, template):
    engine.tokenizer.chat_template = template
    form = PromptFormat(engine.tokenizer)
    ids, before = build_prompt(engine, [Document("d", TEXT)], f" {QUESTION}\n")
    assert ids == form.encode(form.question(TEXT, QUESTION))
    other, _ = build_prompt(engine, [Document("d", TEXT)], "Who is it?")
    # another question may continue from there
    assert len(ids) - before < 25 and ids[:before] == other[:before]
    if template:
        messages = [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
        expected = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    else:
        expected = engine.tokenizer(TEXT + format_question(QUESTION))["input_ids"]
    assert ids == expected


def test_an_absent_fact_is_not_found_and_unlikely_words_are_doubted(engine, monkeypatch):
    text = "Nothing of note happened that day.\n" * 30 + TEXT + "\nThe hall was quiet.\n" * 20
    said = ask(engine, [Document("d", text)], QUESTION, quiet=True)
    assert said.text == "90217" and said.least_confidence > DOUBTFUL and said.notes == []
    absent = ask(engine, [Document("d", text)], "What is the serial number of unit Velmora?", quiet=True)
    assert absent.text == "not found" and absent.notes == []
    # Whatever the words' probability: below what is called doubtful, the note comes.
    monkeypatch.setattr(sys.modules["opensala.engine.ask"], "DOUBTFUL", 1.01)
    doubted = ask(engine, [Document("d", text)], QUESTION, quiet=True)
    assert doubted.text == "90217" and 0 < doubted.least_confidence <= doubted.confidence <= 1
    assert doubted.notes[0].startswith("the documents may not say this")


class Bytes:
    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode()


def test_an_answer_ends_where_an_invented_question_begins(engine, monkeypatch):
    invented = f" 90217{NEXT_QUESTION} Who is the owner?\nAnswer: Marla"
    script = iter(2 * list(invented.encode()))

    class Scripted(Detokenizer):
        """Says the same whatever the model generates."""

        def __init__(self, tokenizer, stop, keep_special, lengths):
            super().__init__(Bytes(), stop, keep_special, {})

        def add(self, token):
            return super().add(next(script))

    monkeypatch.setattr(engine_module, "Detokenizer", Scripted)
    params = SamplingParams(max_tokens=len(invented), ignore_eos=True)
    result = ask(engine, [Document("d", TEXT)], QUESTION, params, quiet=True)
    assert result.text == "90217" and result.finish_reason == "stop" and result.new_tokens < 20
    script = iter(invented.encode())
    engine.tokenizer.chat_template = CHAT  # a conversation's end is marked by its own token
    assert ask(engine, [Document("d", TEXT)], QUESTION, params, quiet=True).text == invented.strip()


def test_the_stop_string_is_how_the_next_question_would_begin(engine):
    form = PromptFormat(engine.tokenizer)
    assert form.stop_strings == [NEXT_QUESTION] and NEXT_QUESTION in format_question("x")


@pytest.mark.parametrize(
    ("question", "message"),
    [(" \n", "the question is empty"), ("caf\udce9", "is not valid UTF-8 .character 4.")],
)
def test_questions_that_are_refused(engine, question, message):
    with pytest.raises(ValueError, match=message):
        build_prompt(engine, [Document("d", TEXT)], question)
