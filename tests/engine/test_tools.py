"""Calls of tools: the form that a chat template has, forcing it, and reading it piece by piece."""

import copy
import json

import pytest
from transformers import AutoTokenizer

from opensala.engine import Engine, EngineOptions, SamplingParams, load_engine, shipped_model
from opensala.engine.calls import CallArguments, CallBegins, CallEnds, CallReader, Text
from opensala.engine.chat import Message, encode_chat
from opensala.engine.tools import CallForm, Tool, ToolCall

from ..templates import BARE, HERMES, LISTED, NO_RESULTS, NO_TOOLS, PYTHON, XML

WEATHER = Tool(
    "get_weather",
    "Says what the weather is.",
    {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = Tool("clock", parameters={"type": "object", "properties": {}, "additionalProperties": False})
FORMS = {"hermes": HERMES, "bare": BARE, "listed": LISTED, "python": PYTHON}


def tokenizer_with(template, special=()):
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(shipped_model()))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def forms():
    return {name: CallForm.of(tokenizer_with(template)) for name, template in FORMS.items()}


def test_the_form_is_the_templates(forms):
    hermes = forms["hermes"]
    assert (hermes.kind, hermes.before, hermes.after) == ("json", "<tool_call>\n", "\n</tool_call>")
    assert hermes.pieces == ('{"name": "', '", "arguments": ', "}")
    bare = forms["bare"]
    assert (bare.before, bare.after, bare.pieces[1]) == ("", "", '", "parameters": ')
    assert (forms["listed"].before, forms["listed"].after) == ("[TOOL_CALLS] [", "]")
    python = forms["python"]
    assert python.kind == "python" and python.before == "<|tool_call_start|>\n```python\n"
    assert python.after == "\n```\n<|tool_call_end|>\n"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has none"),
        (NO_TOOLS, "does not show them"),
        (NO_RESULTS, "leaves their results out"),
        (XML, "a form that is not read: <function=probe"),
        ("{{ raise_exception('no tools, please') }}", "no tools, please"),
    ],
)
def test_a_template_without_them_is_refused(template, says):
    with pytest.raises(ValueError, match=says):
        CallForm.of(tokenizer_with(template))


def test_tools_calls_and_results_reach_the_template():
    tokenizer = tokenizer_with(HERMES)
    talk = [
        Message("user", ("What is it like in Rome?",)),
        Message("assistant", ("I look.",), (ToolCall("c1", "get_weather", {"city": "Rome"}),)),
        Message("tool", ("sunny",), call_id="c1"),
    ]
    text = tokenizer.decode(encode_chat(tokenizer, talk, tools=[WEATHER]).ids, skip_special_tokens=True)
    assert '"name": "get_weather"' in text and "Says what the weather is." in text
    call = 'I look.<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert call in text and "<tool_response>sunny</tool_response>" in text


@pytest.mark.parametrize(
    ("talk", "says"),
    [
        ([Message("user", ("Hi",)), Message("tool", ("x",), call_id="c9")], "'c9'"),
        ([Message("user", ("Hi",), (ToolCall("c1", "f", {}),))], "its role is 'user'"),
    ],
)
def test_results_and_calls_where_they_cannot_be(talk, says):
    with pytest.raises(ValueError, match=says):
        encode_chat(tokenizer_with(HERMES), talk)


def test_without_a_template_tools_are_refused():
    with pytest.raises(ValueError, match="chat template"):
        encode_chat(tokenizer_with(None), [Message("user", ("Hi",))], tools=[CLOCK])


def read(form, text, size=1, most=None):
    """What is told of a text that comes `size` characters at a time: texts joined, calls with arguments."""
    reader, parts = CallReader(form, {"get_weather", "clock"}, most), []
    for start in range(0, len(text), size):
        parts += reader.add(text[start : start + size])
    parts += reader.add("", last=True)
    told = []
    for part in parts:
        if isinstance(part, Text):
            told = (
                [*told[:-1], told[-1] + part.text]
                if told and isinstance(told[-1], str)
                else [*told, part.text]
            )
        elif isinstance(part, CallBegins):
            told.append([part.name, ""])
        elif isinstance(part, CallArguments):
            told[-1][1] += part.text
    ended = sum(isinstance(part, CallEnds) for part in parts)
    assert ended <= reader.num_calls == sum(isinstance(part, CallBegins) for part in parts)
    return told


ROME, OSLO = '{"city": "Rome"}', '{"city": "Oslo", "days": 2}'
ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "told"),
    [
        ("hermes", "Just text, 1 < 2 <tool.", ["Just text, 1 < 2 <tool."]),
        ("hermes", f"\n\nI look.\n{ONE}", ["I look.", ["get_weather", ROME]]),
        (
            "hermes",
            f"{ONE}\n{ONE.replace('Rome', 'Oslo')} done",
            [["get_weather", ROME], ["get_weather", '{"city": "Oslo"}'], "done"],
        ),
        ("hermes", ONE.replace("\n", ""), [["get_weather", ROME]]),
        ("hermes", ONE.removesuffix("\n</tool_call>"), [["get_weather", ROME]]),
        ("hermes", ONE.removesuffix("call>"), [["get_weather", ROME]]),
        (
            "hermes",
            '<tool_call>{"name":"get_weather","arguments":{"city":"}]\\"{"}}</tool_call>',
            [["get_weather", '{"city":"}]\\"{"}']],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>',
            [["get_weather", ROME]],
        ),
        ("hermes", ONE.replace("get_weather", "unknown"), [ONE.replace("get_weather", "unknown")]),
        ("hermes", "<tool_call>no json</tool_call>", ["<tool_call>no json</tool_call>"]),
        (
            "hermes",
            '<tool_call>{"name": "clock", "arguments": 5}</tool_call>',
            ['<tool_call>{"name": "clock", "arguments": 5}</tool_call>'],
        ),
        ("hermes", '<tool_call>{"name": "get_wea', ['<tool_call>{"name": "get_wea']),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"ci', [["get_weather", '{"ci']]),
        ("bare", '{"name": "get_weather", "parameters": {"city": "Rome"}}', [["get_weather", ROME]]),
        (
            "bare",
            '\n{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {}}',
            [["clock", "{}"]] * 2,
        ),
        ("bare", '{"city": "Rome"}', ['{"city": "Rome"}']),
        ("bare", 'So {"name": "clock", "parameters": {}}', ['So {"name": "clock", "parameters": {}}']),
        (
            "listed",
            '[TOOL_CALLS] [{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]',
            [["clock", "{}"]] * 2,
        ),
        (
            "python",
            '<|tool_call_start|>\n```python\nget_weather(city="Oslo", days=2)\n```\n<|tool_call_end|>\nNow.',
            [["get_weather", OSLO], "Now."],
        ),
        (
            "python",
            "<|tool_call_start|>\n```python\nclock()\nget_weather(city='Oslo',days=2)\n```\n<|tool_call_end|>",
            [["clock", "{}"], ["get_weather", OSLO]],
        ),
        (
            "python",
            "<|tool_call_start|>\n```python\nclock(a=true, b=[None, -1.5])",
            [["clock", '{"a": true, "b": [null, -1.5]}']],
        ),
        (
            "python",
            "<|tool_call_start|>\n```python\nimport os\n```\n<|tool_call_end|>",
            ["<|tool_call_start|>\n```python\nimport os\n```\n<|tool_call_end|>"],
        ),
    ],
)
def test_calls_are_read_in_any_pieces(forms, form, text, told, size):
    assert read(forms[form], text, size) == told


def test_no_more_calls_than_may_be(forms):
    assert read(forms["hermes"], f"{ONE}{ONE} text", most=1) == [["get_weather", ROME]]


def test_arguments_are_told_as_they_come(forms):
    reader = CallReader(forms["hermes"], {"get_weather"})
    assert reader.add('<tool_call>\n{"name": "get_weather", "argu') == []
    assert reader.add('ments": {"city": "Ro') == [
        CallBegins(0, "get_weather"),
        CallArguments(0, '{"city": "Ro'),
    ]
    assert reader.add('me"}') == [CallArguments(0, 'me"}'), CallEnds(0)]


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
    return load_engine(options=EngineOptions(max_cached_tokens=8192))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_a_forced_call_can_be_read(engine, forms, name, temperature):
    form, other = forms[name], Engine(engine.model, tokenizer_with(FORMS[name]), engine.options)
    for tools, many in (([WEATHER], False), ([WEATHER, CLOCK], True)):
        grammar = form.grammar(tools, other.grammars.literal, many=many)
        params = SamplingParams(max_tokens=1200, temperature=temperature, seed=1, grammar=grammar)
        ids = encode_chat(other.tokenizer, [Message("user", ("Rome?",))], tools=tools).ids
        (done,) = other.generate([ids], params)
        told = read(form, done.text)
        assert done.finish_reason.value == "stop" and len(told) <= (8 if many else 1)
        for called, arguments in told:  # nothing is text
            found = json.loads(arguments)
            assert set(found) <= {"city", "days"} if called == "get_weather" else found == {}
            assert called == "clock" or found["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("special", [False, True])
def test_text_is_free_until_a_call_is_announced(engine, special):
    tokenizer = tokenizer_with(HERMES)
    if special:
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    size = max(len(tokenizer), engine.config.vocab_size)
    from opensala.engine.grammar import Grammars

    grammars = Grammars(tokenizer, size, engine.end_ids)
    form = CallForm.of(tokenizer)
    grammar = form.grammar([WEATHER], grammars.literal, many=True, free=True)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    good = encode(f"I look. {ONE}\n{ONE} and {{}}") + [2]
    bad = encode('Hm <tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}')
    assert grammars.guide(grammar).check(good) >= len(good) - 1
    allowed = grammars.guide(grammar).check(bad)
    assert tokenizer.decode(bad[:allowed]).endswith('"city": "')


def test_calls_that_cannot_be_forced(forms):
    literal = json.dumps
    with pytest.raises(ValueError, match="marks its calls"):
        forms["bare"].grammar([CLOCK], literal, many=True, free=True)
    for schema in ({"properties": {"a-b": {}}}, {"required": ["x"]}):
        with pytest.raises(ValueError, match="name of a variable"):
            forms["python"].grammar([Tool("f", parameters=schema)], literal, many=False)
    with pytest.raises(ValueError, match="hyphens"):
        Tool("a b")
