"""OpenAI's API, by its own client."""

import openai
import pytest

from .conftest import DOCUMENT, QUESTION

ASK = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client, **changes):
    return client.chat.completions.create(**{"model": "small", "messages": ASK, **changes})


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "small" and client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_chat_answers_from_the_document(client):
    done = chat(client)
    assert done.choices[0].message.content == "48213" and done.choices[0].finish_reason == "stop"
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_a_second_question_does_not_read_the_document_again(client):
    text = DOCUMENT.replace("north", "south")
    first = chat(client, messages=[{"role": "user", "content": f"{text}\n\nWho is it?"}])
    second = chat(
        client, messages=[{"role": "user", "content": f"{text}\n\n{QUESTION.replace('north', 'south')}"}]
    )
    assert first.usage.prompt_tokens_details.cached_tokens < 20
    assert second.usage.prompt_tokens_details.cached_tokens > 0.9 * second.usage.prompt_tokens
    extension = second.usage.model_extra["opensala"]
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert extension["read_tokens"] == second.usage.prompt_tokens - cached and extension["read_because"]
    assert second.choices[0].message.content == "48213"


def test_a_changing_billing_or_date_line_leaves_the_prefix_alone(client):
    usages = []
    for day, build in (("26", "a1"), ("27", "b2")):
        system = (
            f"x-anthropic-billing-header: cc_version=2.1; cch={build};\nYou answer briefly.\n"
            f"Today's date is 2026-11-{day}.\n{DOCUMENT}"
        )
        messages = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
        done = chat(client, messages=messages)
        usages.append(done.usage)
    assert usages[1].prompt_tokens_details.cached_tokens > 0.9 * usages[1].prompt_tokens


def test_streams_say_the_same(client):
    whole = chat(client, logprobs=True, top_logprobs=2, n=2)
    chunks = list(
        chat(client, logprobs=True, top_logprobs=2, n=2, stream=True, stream_options={"include_usage": True})
    )
    texts, reasons, tokens = ["", ""], [None, None], [[], []]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None and chunk.object == "chat.completion.chunk"
        assert reasons[choice.index] is None, "nothing comes after the end"
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices
    assert texts == [c.message.content for c in whole.choices] == ["48213", "48213"]
    assert reasons == ["stop", "stop"]
    assert tokens == [c.logprobs.content for c in whole.choices]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    cached = chunks[-1].usage.prompt_tokens_details.cached_tokens  # counted once, not for each choice
    assert 0.9 * whole.usage.prompt_tokens < cached < whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


def test_logprobs_are_those_of_the_answer(client):
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    entries = choice.logprobs.content
    assert "".join(e.token for e in entries).strip() == "48213"
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0  # greedy
    assert chat(client).choices[0].logprobs is None
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_max_tokens_stop_and_seed(client):
    for name in ("max_tokens", "max_completion_tokens"):
        (choice,) = chat(client, **{name: 3}).choices
        assert (
            choice.finish_reason == "length" and choice.message.content == "48"
        )  # the blank was one of three
    (choice,) = chat(client, stop=["21", "z"]).choices
    assert choice.finish_reason == "stop" and choice.message.content == "48"
    hot = {"temperature": 2.0, "max_tokens": 12, "n": 3, "extra_body": {"top_k": 50, "min_p": 0.0001}}
    texts = [[c.message.content for c in chat(client, seed=seed, **hot).choices] for seed in (5, 5, -9)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1
    assert chat(client, temperature=1.5, top_p=0, seed=1).choices[0].message.content == "48213"


def test_penalties_change_what_repeats(client):
    asked = {"model": "small", "prompt": "one two one two one two one", "max_tokens": 20}
    plain = client.completions.create(**asked).choices[0].text
    for changes in (
        {"frequency_penalty": 2},
        {"presence_penalty": 2},
        {"extra_body": {"repetition_penalty": 3}},
    ):
        assert client.completions.create(**asked, **changes).choices[0].text != plain, changes


def test_fields_without_effect_are_ignored(client):
    plain = chat(client)
    done = chat(
        client,
        user="me",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=False,
        prompt_cache_key="k",
        safety_identifier="s",
        reasoning_effort="low",
        verbosity="low",
        response_format={"type": "text"},
        tools=[],
        logit_bias={},
        modalities=["text"],
        temperature=None,
        extra_body={"tool_choice": "none"},
    )
    assert done.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing_required_parameter",
        ),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"extra_body": {"foo": 1}}, "foo", "unknown_parameter"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": 1e-9}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 32_769}, "max_tokens", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop[0]", "invalid_value"),
        ({"seed": 1 << 63}, "seed", "invalid_value"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].tool_call_id",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, None, None),
        (
            {"messages": [{"role": "user", "content": "word " * 70_000}]},
            "max_tokens",
            "context_length_exceeded",
        ),
    ],
)
def test_what_is_wrong_is_named(client, changes, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **changes)
    error = caught.value.body
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert param is None or param in error["message"] or code == "context_length_exceeded"


def test_unknown_models_are_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-9")
    assert caught.value.body["code"] == "model_not_found" and caught.value.body["param"] == "model"


def test_completions(client, live):
    prompt = f"{DOCUMENT}\n\nQuestion: {QUESTION}\nAnswer:"
    done = client.completions.create(model="small", prompt=prompt, max_tokens=6, logprobs=2)
    (choice,) = done.choices
    assert choice.text == " 48213" and choice.finish_reason == "length"
    assert "".join(choice.logprobs.tokens) == " 48213" and choice.logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    pairs = zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True)
    assert all(max(top.values()) == logprob for top, logprob in pairs)
    ids = live.service.engine.encode(prompt)
    assert client.completions.create(model="small", prompt=ids, max_tokens=6).choices[0].text == " 48213"
    many = client.completions.create(model="small", prompt=["import os\n", ids], n=2, max_tokens=4, echo=True)
    assert [c.index for c in many.choices] == [0, 1, 2, 3] and many.usage.completion_tokens == 16
    assert many.choices[0].text.startswith("import os\n") and many.choices[3].text.endswith(" 482")
    assert many.usage.prompt_tokens == len(ids) + len(live.service.engine.encode("import os\n"))


def test_streamed_completions(client):
    asked = {
        "model": "small",
        "prompt": ["import os\nimport ", "def "],
        "max_tokens": 9,
        "logprobs": 1,
        "n": 2,
    }
    whole = client.completions.create(**asked)
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
    assert texts == [c.text for c in whole.choices] and tokens == [c.logprobs.tokens for c in whole.choices]
    assert last.usage.completion_tokens == 36


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": [5, 2**40]}, "prompt[0]"),
        ({"prompt": [5, 2**20]}, None),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ["a"] * 64, "n": 2}, "n"),
    ],
)
def test_completions_that_cannot_be(client, changes, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "small", "prompt": "a", **changes})
    assert (caught.value.body["param"] or "").startswith(param or "")


def test_a_prompt_of_no_kind_is_told_what_kinds_there_are(client):
    for prompt, place in (([-1], "prompt[0]"), (["a", 5], "prompt[1]")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="small", prompt=prompt)
        body = caught.value.body
        assert body["param"] == place and "should be a valid string or input should be" in body["message"]


def test_responses(client):
    done = client.responses.create(model="small", input=ASK[0]["content"], metadata={"a": "b"})
    assert done.output_text == "48213" and done.status == "completed" and done.metadata == {"a": "b"}
    assert done.usage.input_tokens_details.cached_tokens > 0 and done.store is False
    short = client.responses.create(
        model="small",
        instructions=DOCUMENT,
        input=[{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}],
        max_output_tokens=3,
        top_logprobs=2,
    )
    assert short.output_text == "48" and short.status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"
    assert [len(e.top_logprobs) for e in short.output[0].content[0].logprobs] == [2, 2, 2]


def test_streamed_responses(client):
    with client.responses.stream(model="small", input=ASK[0]["content"]) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == "48213"
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "maybe"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}, "strict": False}]}, "tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
    ],
)
def test_responses_that_cannot_be(client, changes, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "small", "input": "x", **changes})
    assert caught.value.body["param"] == param


def test_cancelling_a_stream_frees_its_memory(client, live):
    live.wait_until_idle()
    stream = client.completions.create(
        model="small", prompt="import os\n", max_tokens=30_000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    live.wait(lambda: live.service.loop.stats.running == 1)
    stream.close()
    live.wait(lambda: live.service.loop.stats.running == 0, 5)
    live.wait(lambda: live.service.gate.num_inside == 0, 5)
