"""Answers of a given form: what the mask leaves, and that batches, seeds and drafts change nothing."""

import json
import re
import sys

import pytest

from opensala.engine import Engine, EngineOptions, Grammar, SamplingParams, load_engine
from opensala.engine.grammar import Grammars, Guide

pytest.importorskip("llguidance", reason="the extra `serve` is not installed")

OPTIONS = EngineOptions(max_cached_tokens=8192, max_running=8, max_batch_tokens=512)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "code": {"type": "integer", "minimum": 0, "maximum": 99999},
        "kind": {"enum": ["gate", "barn"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "code", "kind", "tags"],
    "additionalProperties": False,
}
PROMPTS = ("The access code for the north gate is 48213.\n\nQuestion: What is it?\nAnswer:", "import os\n")


@pytest.fixture(scope="module")
def engine():
    return load_engine(options=OPTIONS)


def run(engine, prompts=PROMPTS, **params):
    params = {"grammar": Grammar.json_schema(SCHEMA), "max_tokens": 250, **params}
    done = engine.generate([engine.encode(p) for p in prompts], SamplingParams(**params))
    engine.check_integrity()
    return done


def check(text):
    found = json.loads(text)
    assert list(found) == ["name", "code", "kind", "tags"], "in the schema's order"
    assert len(found["name"]) <= 12 and 0 <= found["code"] <= 99999 and found["kind"] in ("gate", "barn")
    assert len(found["tags"]) <= 3 and all(isinstance(tag, bool) for tag in found["tags"])


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 3.0, "seed": 4, "top_k": 2, "top_p": 0.3, "min_p": 0.4},
        {"temperature": 50.0, "seed": 5},
        {"repetition_penalty": 3.0, "frequency_penalty": 5.0},
    ],
)
def test_every_answer_has_the_form(engine, params):
    for done in run(engine, **params):
        assert done.finish_reason.value == "stop"
        check(done.text)


def test_the_mask_leaves_what_can_still_be_the_form(engine):
    guide = engine.grammars.guide(Grammar.json_schema({"enum": ["alpha", "beta"]}))
    wanted = ['"alpha"', '"beta"']
    for token in (*engine.tokenizer('"al', add_special_tokens=False)["input_ids"],):
        so_far = engine.tokenizer.decode(engine.tokenizer('"al')["input_ids"][1:][: guide.taken])
        texts = [engine.tokenizer.decode([t]) for t in range(engine.config.vocab_size)]
        expected = {t for t, x in enumerate(texts) if x and any(w.startswith(so_far + x) for w in wanted)}
        assert set(guide.allowed().nonzero()[:, 0].tolist()) == expected, so_far
        guide.take(token)


def test_what_an_answer_may_end_with_is_the_end_of_text(engine):
    guide = engine.grammars.guide(Grammar.json_schema({"const": 7}))
    guide.take(engine.tokenizer("7", add_special_tokens=False)["input_ids"][0])
    assert set(guide.allowed().nonzero()[:, 0].tolist()) == engine.end_ids


def test_companions_and_drafts_change_nothing(engine):
    for params in ({}, {"temperature": 2.0, "seed": 9}):
        alone = [run(engine, [p], **params)[0] for p in PROMPTS]
        together = run(engine, [*PROMPTS, *PROMPTS], **params)
        drafted = run(engine, **params, speculate=6)
        assert [d.tokens for d in together] == 2 * [d.tokens for d in alone]
        assert [d.tokens for d in drafted] == [d.tokens for d in alone]
        assert [d.logprobs for d in together[:2]] == [d.logprobs for d in alone]
    text = '[true, true, true]\n{"a": [true, true, true, true, true, true]}\n'
    grammar = Grammar.json_schema({"type": "array", "items": {"const": True}, "minItems": 6, "maxItems": 6})
    plain, drafted = (run(engine, [text], grammar=grammar, speculate=n)[0] for n in (0, 6))
    assert plain.tokens == drafted.tokens and drafted.accepted > 5


def test_free_answers_beside_are_free(engine):
    params = [SamplingParams(max_tokens=20), SamplingParams(max_tokens=60, grammar=Grammar.json_object())]
    ids = [engine.encode(PROMPTS[0])] * 2
    free, bound = engine.generate(ids, params)
    assert free.text == engine.generate(ids[:1], params[0])[0].text and "{" not in free.text
    assert bound.text.startswith("{")


def test_a_step_that_is_discarded_is_taken_again(engine, monkeypatch):
    expected = run(engine, speculate=4)
    choose, fails = engine.chooser.choose, iter(range(100))

    def failing(step, hidden):
        outcomes = choose(step, hidden)  # the guides have moved on
        if next(fails) % 3 == 0:
            raise MemoryError
        return outcomes

    monkeypatch.setattr(engine.chooser, "choose", failing)
    params = SamplingParams(max_tokens=250, grammar=Grammar.json_schema(SCHEMA), speculate=4)
    texts = {engine.add(engine.encode(p), params): "" for p in PROMPTS}
    while engine.has_work:
        try:
            for event in engine.step():
                texts[event.request_id] += event.text
        except MemoryError:
            pass
    assert list(texts.values()) == [done.text for done in expected]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"$ref": "https://example.org/schema"}, "not present"),
        ({"type": "banana"}, "banana"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"enum": ["x" * 300_000]}, "characters"),
    ],
)
def test_what_cannot_be_enforced_is_refused(engine, schema, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.add([1], SamplingParams(grammar=Grammar.json_schema(schema)))
    assert not engine.num_requests


def test_a_grammar_that_gets_too_complex_ends_its_own_request_only(engine, monkeypatch):
    class Failing:
        """Of llguidance's matchers the one that reached a limit."""

        rollback = consume_token = lambda self, _: True
        compute_bitmask, get_error = lambda self: bytes(256), lambda self: "too many states"
        is_error = lambda self: True  # noqa: E731

    monkeypatch.setattr(engine.grammars, "guide", lambda grammar: Guide(Failing(), 2048, [2]))
    params = [SamplingParams(max_tokens=200, grammar=Grammar.json_object()), SamplingParams()]
    ids = {engine.add(engine.encode(PROMPTS[0]), p): p for p in params}
    done = {}
    while engine.has_work:
        done |= {e.request_id: e.completion for e in engine.step() if e.completion is not None}
    bad, good = (done[i] for i in ids)
    assert bad.by_request and "too many states" in bad.error and good.error is None and good.text


def test_without_the_library_a_grammar_is_refused(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"opensala\[serve\]"):
        Grammars(engine.tokenizer, engine.config.vocab_size, engine.end_ids).guide(Grammar.json_object())


def test_what_a_grammar_needs(engine):
    vocab = engine.config.vocab_size
    with pytest.raises(ValueError, match="fast tokenizer"):
        Grammars(None, vocab, engine.end_ids).guide(Grammar.json_object())
    with pytest.raises(ValueError, match="end of text"):
        Grammars(engine.tokenizer, vocab, frozenset()).guide(Grammar.json_object())
    with pytest.raises(ValueError, match="must be a Grammar"):
        SamplingParams(grammar="{}")
    with pytest.raises(ValueError, match="ignore_eos"):
        SamplingParams(grammar=Grammar.json_object(), ignore_eos=True)


def test_the_latest_grammars_are_kept(engine):
    grammars = Grammars(engine.tokenizer, engine.config.vocab_size, engine.end_ids)
    first = grammars.compile(Grammar.json_schema({"const": 0}))
    assert grammars.compile(Grammar.json_schema({"const": 0})) is first
    for number in range(1, 70):
        grammars.compile(Grammar.json_schema({"const": number}))
    assert grammars.compile(Grammar.json_schema({"const": 0})) is not first


def test_an_engine_of_another_vocabulary_size_is_masked_to_its_own(engine):
    small = Engine(engine.model, engine.tokenizer, OPTIONS)
    assert small.grammars.guide(Grammar.json_object()).allowed().shape == (small.config.vocab_size,)
