"""Anthropic's API, by its own client."""

import anthropic
import pytest

from opensala.engine import Completion, FinishReason
from opensala.server.anthropic_schema import MessagesRequest
from opensala.server.messages import _Answer

from .conftest import DOCUMENT, QUESTION

ASK = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]


@pytest.fixture(scope="module")
def client(live):
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def create(client, **changes):
    return client.messages.create(**{"model": "small", "max_tokens": 20, "messages": ASK, **changes})


def test_a_message(client):
    done = create(client)
    assert done.content[0].text == "48213" and (done.stop_reason, done.stop_sequence) == ("end_turn", None)
    counted = client.messages.count_tokens(model="small", messages=ASK).input_tokens
    assert done.usage.input_tokens + done.usage.cache_read_input_tokens == counted


def test_documents_and_system_blocks_are_read_once(client):
    source = {"type": "text", "media_type": "text/plain", "data": DOCUMENT.replace("north", "east")}
    document = {
        "type": "document",
        "title": "Gates",
        "source": source,
        "cache_control": {"type": "ephemeral"},
    }
    usages = []
    for day in ("26", "27"):
        question = {"type": "text", "text": QUESTION.replace("north", "east")}
        system = [
            {"type": "text", "text": f"x-anthropic-billing-header: cch={day};"},
            {"type": "text", "text": f"You answer.\nToday's date: 2026-11-{day}"},
        ]
        done = create(client, system=system, messages=[{"role": "user", "content": [document, question]}])
        assert done.content[0].text == "48213"
        usages.append(done.usage)
    assert usages[0].cache_read_input_tokens < 10 < 100 < usages[0].input_tokens
    assert usages[1].cache_read_input_tokens > 9 * usages[1].input_tokens


def test_why_it_ended(client):
    done = create(client, stop_sequences=["zz", "21"])
    assert (done.stop_reason, done.stop_sequence, done.content[0].text) == ("stop_sequence", "21", "48")
    done = create(client, max_tokens=3)
    assert (done.stop_reason, done.content[0].text, done.usage.output_tokens) == ("max_tokens", "48", 3)


@pytest.mark.parametrize(
    ("stop", "reason", "told"),
    [
        ("21", FinishReason.STOP, ("stop_sequence", "21")),
        ("\nQuestion:", FinishReason.STOP, ("end_turn", None)),  # the form's own, which nobody asked for
        (None, FinishReason.STOP, ("end_turn", None)),
        (None, FinishReason.LENGTH, ("max_tokens", None)),
    ],
)
def test_only_stop_sequences_that_were_asked_for_are_told(stop, reason, told):
    body = {"model": "small", "max_tokens": 5, "messages": ASK, "stop_sequences": ["21"]}
    answer = _Answer(None, MessagesRequest.parse(body), None, "req_1")
    assert answer._stop(Completion("", finish_reason=reason, stop=stop)) == told


def test_an_answer_that_was_begun_is_continued(client):
    done = create(client, messages=[*ASK, {"role": "assistant", "content": "48"}])
    assert done.content[0].text == "213"


def test_streams_say_the_same(client):
    with client.messages.stream(model="small", max_tokens=20, messages=ASK) as stream:
        kinds = [event.type for event in stream]
        done = stream.get_final_message()
    assert done.content[0].text == "48213" and done.stop_reason == "end_turn"
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    again = create(client)
    assert (done.usage.input_tokens, done.usage.cache_read_input_tokens, done.usage.output_tokens) == (
        again.usage.input_tokens,
        again.usage.cache_read_input_tokens,
        again.usage.output_tokens,
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extra_body": {"foo": 1}}, "foo"),
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}}]}, "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a", " \n"]}, "each stop sequence must contain"),
    ],
)
def test_what_is_wrong_is_named(client, changes, says):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(client, **changes)
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert says in body["error"]["message"] and body["request_id"].startswith("req_")


def test_fields_without_effect_are_ignored(client):
    extra = {"temperature": 0, "top_k": 5, "metadata": {"user_id": "x"}, "thinking": {"type": "disabled"}}
    assert create(client, extra_body=extra).content[0].text == "48213"


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == model.display_name == "small"
    with pytest.raises(anthropic.NotFoundError) as caught:
        create(client, model="other")
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_cancelling_a_stream_frees_its_memory(client, live):
    live.wait_until_idle()
    with client.messages.stream(model="small", max_tokens=3000, messages=ASK, extra_body={}) as stream:
        next(iter(stream))
    live.wait(lambda: live.service.loop.stats.running == 0, 5)
