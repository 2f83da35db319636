"""Tools and forms of answers by the official clients: a model that says what it is told, and forced calls."""

import copy
import json

import anthropic
import openai
import pytest
import torch

from opensala.engine import Engine, EngineOptions
from opensala.engine.choosing import Chooser

from ..templates import HERMES
from .conftest import Live

pytest.importorskip("llguidance", reason="a part of the extra `serve`")

OPTIONS = EngineOptions(max_cached_tokens=20_000, max_running=4, max_batch_tokens=512)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CLOCK_SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTION = {"name": "get_weather", "description": "Says what the weather is.", "parameters": SCHEMA}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "clock"}}]
RESPONSES_TOOLS = [{"type": "function", "strict": None, **FUNCTION}]
ANTHROPIC_TOOLS = [
    {"name": "get_weather", "description": "Says what the weather is.", "input_schema": SCHEMA},
    {"name": "clock", "input_schema": {"type": "object"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
ASK = [{"role": "user", "content": "What is it like in Rome?"}]


class Scripted(Chooser):
    """Finds the tokens of `script` the likeliest, if there is one, whatever the model thinks."""

    script = None

    def _choose_tokens(self, wanted, logits):
        if self.script is not None:
            places = [
                work.sequence.num_tokens - work.sequence.num_prompt + ahead
                for work, _ in wanted
                for ahead in range(work.drafted + 1)
            ]
            logits = torch.zeros_like(logits)
            for row, place in zip(logits, places, strict=True):
                row[self.script[min(place, len(self.script) - 1)]] = 1.0
        super()._choose_tokens(wanted, logits)


@pytest.fixture(scope="module")
def talker(model):
    """A server whose model has a chat template with tools."""
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = HERMES
    engine = Engine(model.model, tokenizer, OPTIONS)
    engine.chooser = Scripted(engine.runner, engine._requests, engine.end_ids)
    live = Live(engine)
    yield live
    live.stop()


@pytest.fixture
def say(talker):
    engine = talker.service.engine

    def one(text):
        ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        engine.chooser.script = [*ids, *engine.end_ids]

    yield one
    engine.chooser.script = None
    talker.wait_until_idle()


@pytest.fixture(scope="module")
def client(talker):
    with openai.OpenAI(base_url=f"{talker.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def claude(talker):
    with anthropic.Anthropic(base_url=talker.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client, **changes):
    return client.chat.completions.create(
        **{"model": "small", "messages": ASK, "tools": CHAT_TOOLS, **changes}
    )


def joined(chunks):
    """The message that a stream's chunks make, as a client puts it together."""
    content, calls, finish = "", [], None
    for chunk in chunks:
        for choice in chunk.choices:
            assert finish is None
            content, finish = content + (choice.delta.content or ""), choice.finish_reason
            for call in choice.delta.tool_calls or []:
                if call.index == len(calls):
                    assert call.id.startswith("call_") and call.type == "function"
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
    return content, calls, finish


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"I look.\n{CALL}", "I look.", [["get_weather", '{"city": "Rome"}']]),
        (f"{CALL}\n{CLOCK}", None, [["get_weather", '{"city": "Rome"}'], ["clock", "{}"]]),
        ("It is sunny.", "It is sunny.", []),
        (CALL.replace("get_weather", "get_time"), CALL.replace("get_weather", "get_time"), []),
    ],
)
def test_a_chat_calls_tools(client, say, text, content, calls):
    say(text)
    (choice,) = chat(client).choices
    found = [[c.function.name, c.function.arguments] for c in choice.message.tool_calls or []]
    assert (choice.message.content, found) == (content, calls)
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    assert joined(chat(client, stream=True)) == (content or "", calls, choice.finish_reason)


def test_arguments_are_streamed_as_they_come(client, say):
    say(CALL)
    pieces = [
        call.function.arguments
        for chunk in chat(client, stream=True)
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    assert len(pieces) > 4 and pieces[0] == "" and json.loads("".join(pieces)) == {"city": "Rome"}


def test_results_go_back_to_the_model(client, say, talker):
    say(CALL)
    (choice,) = chat(client).choices
    call = choice.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "22 degrees"}]}
    say("It is 22 degrees.")
    done = chat(client, messages=[*ASK, choice.message.model_dump(exclude_none=True), result])
    assert done.choices[0].message.content == "It is 22 degrees."
    tokens = client.post(
        "../tokenize",
        cast_to=object,
        body={"messages": [*ASK, choice.message.model_dump(exclude_none=True), result]},
    )["tokens"]
    text = talker.service.engine.tokenizer.decode(tokens)
    assert CALL in text and "<tool_response>22 degrees</tool_response>" in text


def test_one_call_only_if_calls_may_not_be_parallel(client, claude, say):
    say(f"{CALL}\n{CLOCK}")
    for stream in (False, True):
        done = chat(client, parallel_tool_calls=False, stream=stream)
        calls = joined(done)[1] if stream else done.choices[0].message.tool_calls
        assert len(calls) == 1
    done = claude.messages.create(
        model="small",
        max_tokens=200,
        messages=ASK,
        tools=ANTHROPIC_TOOLS,
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )
    assert [block.name for block in done.content] == ["get_weather"] and done.stop_reason == "tool_use"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_can_be_forced(client, choice):
    tools = [CHAT_TOOLS[0], {"type": "function", "function": {"name": "clock", "parameters": CLOCK_SCHEMA}}]
    for temperature in (0, 2):
        done = chat(client, tools=tools, tool_choice=choice, temperature=temperature, seed=4, max_tokens=700)
        assert done.choices[0].finish_reason == "tool_calls" and done.choices[0].message.content is None
        for call in done.choices[0].message.tool_calls:
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "get_weather" or choice == "required"
            assert call.function.name == "clock" or arguments["city"] in ("Oslo", "Rome")


def test_a_call_can_be_forbidden(client, say):
    say(CALL)
    (choice,) = chat(client, tool_choice="none").choices
    assert choice.message.tool_calls is None and choice.message.content == CALL
    assert choice.finish_reason == "stop"


def test_strict_tools_cannot_be_called_otherwise(client):
    strict = [{"type": "function", "function": {**FUNCTION, "strict": True}}]
    done = chat(client, tools=strict, max_tokens=30)  # whatever it says, it says
    assert done.choices[0].finish_reason in ("length", "stop", "tool_calls")


def test_responses_call_tools(client, say):
    say(f"I look.\n{CALL}")
    asked = {"model": "small", "input": ASK, "tools": RESPONSES_TOOLS}
    done = client.responses.create(**asked)
    assert [item.type for item in done.output] == ["message", "function_call"]
    call = done.output[1]
    assert (call.name, call.arguments, call.status) == ("get_weather", '{"city": "Rome"}', "completed")
    assert (
        done.output_text == "I look." and done.tools[0].name == "get_weather" and done.tool_choice == "auto"
    )
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    assert (
        "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        == call.arguments
    )
    assert [(i.type, getattr(i, "arguments", None)) for i in final.output] == [
        ("message", None),
        ("function_call", '{"city": "Rome"}'),
    ]
    say("It is 22 degrees.")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}
    again = client.responses.create(
        **{**asked, "input": [*ASK, *(i.model_dump(exclude_none=True) for i in done.output), result]}
    )
    assert again.output_text == "It is 22 degrees."
    forced = client.responses.create(
        **{**asked, "tool_choice": {"type": "function", "name": "get_weather"}}, parallel_tool_calls=False
    )
    assert forced.tool_choice.name == "get_weather"


def test_messages_call_tools(claude, say):
    say(f"I look.\n{CALL}")
    asked = {"model": "small", "max_tokens": 200, "messages": ASK, "tools": ANTHROPIC_TOOLS}
    done = claude.messages.create(**asked)
    text, call = done.content
    assert (text.text, call.type, call.name, call.input) == (
        "I look.",
        "tool_use",
        "get_weather",
        {"city": "Rome"},
    )
    assert done.stop_reason == "tool_use" and call.id.startswith("toolu_")
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use" and final.content[1].input == {"city": "Rome"}
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "22 degrees"}
    turns = [*ASK, {"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
    say("It is 22 degrees.")
    again = claude.messages.create(**{**asked, "messages": turns})
    assert again.content[0].text == "It is 22 degrees." and again.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model="small", messages=turns, tools=ANTHROPIC_TOOLS).input_tokens
    assert counted == again.usage.input_tokens + again.usage.cache_read_input_tokens
    assert counted > claude.messages.count_tokens(model="small", messages=turns).input_tokens + 20


def test_messages_can_be_forced(claude):
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        done = claude.messages.create(
            model="small",
            max_tokens=2000,
            messages=ASK,
            tools=ANTHROPIC_TOOLS[:1],
            tool_choice={**choice, "disable_parallel_tool_use": True},
        )
        (call,) = done.content
        assert call.input["city"] in ("Oslo", "Rome") and done.stop_reason == "tool_use"


def test_a_call_that_is_cut_off_says_so(client, claude, say):
    say(CALL)
    (choice,) = chat(client, max_tokens=25).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.arguments != ""
    done = claude.messages.create(model="small", max_tokens=25, messages=ASK, tools=ANTHROPIC_TOOLS)
    assert done.stop_reason == "max_tokens" and done.content[0].input == {}


FORM = {
    "type": "object",
    "properties": {"code": {"type": "integer", "minimum": 0, "maximum": 99999}, "ok": {"type": "boolean"}},
    "required": ["code", "ok"],
    "additionalProperties": False,
}


def is_form(text):
    found = json.loads(text)
    return set(found) == {"code", "ok"} and 0 <= found["code"] <= 99999 and isinstance(found["ok"], bool)


@pytest.fixture(scope="module")
def plain(live):
    """The shipped model as it is, without a chat template."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_answers_have_the_form_that_is_asked_for(plain, live):
    schema = {"type": "json_schema", "json_schema": {"name": "code", "schema": FORM, "strict": True}}
    asked = {"model": "small", "messages": ASK, "max_tokens": 100}
    done = plain.chat.completions.create(**asked, response_format=schema, n=3, temperature=2, seed=1)
    assert all(is_form(c.message.content) and c.finish_reason == "stop" for c in done.choices)
    done = plain.chat.completions.create(**asked, response_format={"type": "json_object"}, temperature=1)
    assert done.choices[0].message.content.startswith("{")
    text = {"format": {"type": "json_schema", "name": "code", "schema": FORM}}
    said = plain.responses.create(model="small", input=ASK, text=text)
    assert is_form(said.output_text) and said.text.format.schema_ == FORM
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as claude:
        said = claude.messages.create(
            model="small",
            max_tokens=100,
            messages=ASK,
            output_config={"format": {"type": "json_schema", "schema": FORM}},
        )
    assert is_form(said.content[0].text) and said.stop_reason == "end_turn"


UNIQUE = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "array", "uniqueItems": True}},
}


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"response_format": UNIQUE, "tools": []}, "response_format", "uniqueItems"),
        ({"response_format": {"type": "json_object"}}, "response_format", "together with 'tools'"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "has none"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "no tool 'f'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
        ({"tools": [*CHAT_TOOLS, CHAT_TOOLS[0]]}, "tools", "'get_weather'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "function"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            },
            "tools",
            "not",
        ),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "c9", "content": "x"}]}, None, "c9"),
    ],
)
def test_what_cannot_be_is_named(client, changes, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **changes)
    assert caught.value.body["param"] == param and says in caught.value.body["message"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tool_choice": {"type": "tool", "name": "f"}}, "no tool 'f'"),
        ({"tool_choice": {"type": "sometimes"}}, "sometimes"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}
                ]
            },
            "tool_use",
        ),
        (
            {"messages": [*ASK, {"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}]},
            "tool_use",
        ),
        (
            {"messages": [*ASK, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "z"}]}]},
            "'z'",
        ),
    ],
)
def test_what_messages_cannot_have_is_named(claude, changes, says):
    with pytest.raises(anthropic.BadRequestError) as caught:
        asked = {"model": "small", "max_tokens": 9, "messages": ASK, "tools": ANTHROPIC_TOOLS}
        claude.messages.create(**{**asked, **changes})
    assert says in caught.value.body["error"]["message"]


def test_a_model_without_a_chat_template_has_no_tools(plain):
    with pytest.raises(openai.BadRequestError, match="chat template") as caught:
        chat(plain)
    assert caught.value.body["param"] == "tools"
