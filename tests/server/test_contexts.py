"""Contexts over HTTP: uploaded once, kept, asked through every API, extended, forked, deleted."""

import asyncio
import base64
import json
import random
import re

import anthropic
import httpx2
import openai
import pytest

from opensala.contexts.kept import Kept, identity
from opensala.engine import Document, Engine, EngineOptions, SamplingParams, ask
from opensala.engine.ask import build_prompt
from opensala.engine.chat import Message
from opensala.server import KeyFile, ServerOptions, new_key

from ..pdfs import make_pdf
from .conftest import DOCUMENT, FILLER, QUESTION

NOTES = "The captain of Silver Heron is Orla Brandt.\n"
CAPTAIN = "Who is the captain of Silver Heron?"
REPORT = {"name": "report", "text": DOCUMENT}
QUICK = {"grace_seconds": 0}


class Client:
    """Plain requests to a server, as one key."""

    def __init__(self, live, key="none"):
        self.live, self.key = live, key
        self.http = httpx2.Client(
            base_url=live.url, headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False
        )

    def send(self, method, path="", body=None, status=200):
        answer = self.http.request(method, f"/v1/contexts{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def create(self, *documents, status=200, **fields):
        body = {"model": "small", "documents": list(documents) or [REPORT], **fields}
        return self.send("POST", "", body, status)

    def refused(self, method, path="", body=None, status=404):
        error = self.send(method, path, body, status)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def ask(self, context, question=QUESTION, **fields):
        with openai.OpenAI(base_url=f"{self.live.url}/v1", api_key=self.key, max_retries=0) as client:
            done = client.chat.completions.create(
                model="small",
                messages=[{"role": "user", "content": question}],
                extra_body={"context": context, **fields},
            )
        return done.choices[0].message.content, done.usage


@pytest.fixture
def kept(start, tmp_path):
    return Client(start(contexts=tmp_path / "kept"))


@pytest.fixture(scope="module")
def shared(live_with_contexts):
    return Client(live_with_contexts)


@pytest.fixture(scope="module")
def live_with_contexts(model, tmp_path_factory):
    from .conftest import OPTIONS, Live

    engine = Engine(model.model, model.tokenizer, OPTIONS)
    server = Live(engine, contexts=tmp_path_factory.mktemp("contexts") / "kept")
    yield server
    server.stop()
    engine.check_integrity()


def names(live):
    return sorted(path.name for path in live.service.keeper.shelf.root.iterdir())


def test_what_is_uploaded_once_is_asked_through_every_api(shared):
    made = shared.create(REPORT, {"name": "notes", "text": NOTES})
    assert re.fullmatch("ctx_[0-9a-f]{32}", made["id"]) and made["documents"] == ["report", "notes"]
    assert made["expires_at"] == made["created_at"] + made["ttl"] and made["bytes"] > 0
    assert shared.send("GET", f"/{made['id']}") == made and made in shared.send("GET")["data"]

    text, usage = shared.ask(made["id"], CAPTAIN)
    assert text == "Orla Brandt" and usage.prompt_tokens_details.cached_tokens == made["tokens"]
    extra = {"context": made["id"]}
    with openai.OpenAI(base_url=f"{shared.live.url}/v1", api_key="none", max_retries=0) as client:
        said = client.responses.create(model="small", input=QUESTION, extra_body=extra)
        assert said.output_text == "48213"
        raw = client.completions.create(
            model="small", prompt=f"\n\nQuestion: {CAPTAIN}\nAnswer:", stop="\n", extra_body=extra
        )
        assert raw.choices[0].text.strip() == "Orla Brandt"
        assert raw.usage.prompt_tokens == usage.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="token ids"):
            client.completions.create(model="small", prompt=[1, 2], extra_body=extra)
    with anthropic.Anthropic(base_url=shared.live.url, api_key="none", max_retries=0) as client:
        question = [{"role": "user", "content": CAPTAIN}]
        done = client.messages.create(model="small", max_tokens=9, messages=question, extra_body=extra)
        assert done.content[0].text == "Orla Brandt"
        count = client.messages.count_tokens(model="small", messages=question, extra_body=extra)
        assert count.input_tokens == usage.prompt_tokens


def test_prompts_have_the_tokens_of_the_command_line(shared, model):
    texts = [DOCUMENT, DOCUMENT.rstrip(), "Short.", "ends in space \n\n "]
    for number, text in enumerate(texts):
        documents = [Document("a", text), *([Document("b", NOTES)] if number % 2 else [])]
        made = shared.create(*({"name": d.name, "text": d.text} for d in documents))
        keeper = shared.live.service.keeper
        kept = Kept(keeper.shelf.folder(made["id"]), keeper.identity, made["id"])
        for question in (QUESTION, f"  {CAPTAIN} ", "why", "1?"):
            wanted, _ = build_prompt(model, documents, question)
            assert kept.chat(model.tokenizer, [Message("user", (question,))]).ids == wanted
        prompt = f"\n\nQuestion: {CAPTAIN}\nAnswer:"
        assert kept.raw(model.tokenizer, prompt).ids == build_prompt(model, documents, CAPTAIN)[0]


def test_with_a_chat_template_system_messages_stand_behind_the_documents(tmp_path, model):
    from transformers import AutoTokenizer

    from opensala.contexts import Context
    from opensala.engine import shipped_model

    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    engine = Engine(model.model, tokenizer, EngineOptions(max_cached_tokens=8192))
    documents = [Document("report", DOCUMENT)]
    Context.ingest(engine, documents, tmp_path / "a.ctx").close()
    kept = Kept(tmp_path / "a.ctx", identity(engine), "a")
    wanted, _ = build_prompt(engine, documents, QUESTION)
    assert kept.chat(tokenizer, [Message("user", (QUESTION,))]).ids == wanted
    talk = [Message("system", ("Be brief.",)), Message("user", (QUESTION,)), Message("assistant", ("1",))]
    found = kept.chat(tokenizer, [*talk, Message("user", ("Sure?",))])
    text = f"<user>{DOCUMENT}\n\nBe brief.\n\n{QUESTION}</user><assistant>1</assistant>"
    text += "<user>Sure?</user><assistant>"
    assert found.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.ids[: len(kept.tokens)] == list(kept.tokens) and len(kept.tokens) in found.marks
    before = [tokenizer.decode(found.ids[:mark]) for mark in found.marks]
    assert before[-1].endswith(("Sure", "Sure?")) and before[-1].startswith("<user>The access")


def test_an_answer_is_that_of_the_command_line(shared, model):
    made = shared.create()
    engine = Engine(model.model, model.tokenizer, EngineOptions(max_cached_tokens=8192))
    question = "What happened that day, and to whom?"
    wanted = ask(engine, [Document("report", DOCUMENT)], question, SamplingParams(max_tokens=12), quiet=True)
    text, _ = shared.ask(made["id"], question, max_tokens=12)
    assert text.strip() == wanted.text


def test_a_conversation_goes_on_behind_the_documents(shared):
    made = shared.create()
    with openai.OpenAI(base_url=f"{shared.live.url}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": QUESTION}]
        messages += [{"role": "assistant", "content": "48213"}, {"role": "user", "content": QUESTION}]
        done = client.chat.completions.create(
            model="small", messages=messages, extra_body={"context": made["id"]}
        )
    assert done.choices[0].message.content == "48213"
    assert done.usage.prompt_tokens_details.cached_tokens >= made["tokens"]


def test_reading_is_watched_by_events(shared):
    body = {"model": "small", "documents": [{"text": FILLER * 1500}], "stream": True}
    with shared.http.stream("POST", "/v1/contexts", json=body) as answer:
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    *steps, made = [json.loads(line) for line in data]
    assert made["object"] == "context" and {step["id"] for step in steps} == {made["id"]}
    read = [step["read_tokens"] for step in steps]
    assert read == sorted(read) and read[-1] == made["tokens"] == steps[0]["tokens"]
    body["documents"] = [{"text": FILLER * 12_000}]
    with shared.http.stream("POST", "/v1/contexts", json=body) as answer:
        assert answer.status_code == 200 and "context_length_exceeded" in answer.read().decode()


def test_a_context_of_another_key_is_not_there(start, tmp_path):
    path = tmp_path / "keys.json"
    secrets = [new_key(path, name)[1] for name in ("ada", "bob")]
    live = start(ServerOptions(**QUICK), KeyFile(path), contexts=tmp_path / "kept")
    ada, bob = (Client(live, key) for key in secrets)
    made = ada.create()
    unknown = "ctx_" + "0" * 32
    for method, tail, body in (
        ("GET", "", None),
        ("DELETE", "", None),
        ("PATCH", "", {"pinned": True}),
        ("POST", "/fork", {}),
        ("POST", "/extend", {"documents": [{"text": "x"}]}),
    ):
        told = [bob.refused(method, f"/{i}{tail}", body)["message"] for i in (made["id"], unknown)]
        assert told[0].replace(made["id"], unknown) == told[1]
    with pytest.raises(openai.NotFoundError):
        bob.ask(made["id"])
    assert bob.send("GET")["data"] == [] and ada.send("GET")["data"] == [made]
    _, usage = ada.ask(made["id"])
    assert usage.prompt_tokens_details.cached_tokens == made["tokens"]
    own = bob.create()
    live.service.engine.scheduler.tree.clear()  # both are loaded anew, each for its own key
    for client, context in ((ada, made), (bob, own)):
        text, usage = client.ask(context["id"])
        assert text == "48213" and usage.prompt_tokens_details.cached_tokens == context["tokens"]


def test_what_the_server_forgot_comes_from_the_folder(kept):
    context = kept.create()["id"]
    answer, usage = kept.ask(context)
    assert "48213" in answer
    loop = kept.live.service.loop
    kept.live.wait_until_idle()
    asyncio.run(loop.forget())
    kept.live.wait(lambda: loop.stats.pages_free == loop.stats.pages and not loop.stats.snapshots)
    again, later = kept.ask(context)
    assert again == answer
    assert later.prompt_tokens_details.cached_tokens == usage.prompt_tokens_details.cached_tokens > 0


def test_extending_makes_a_new_context(kept):
    made = kept.create({"name": "a", "text": DOCUMENT})
    more = kept.send("POST", f"/{made['id']}/extend", {"documents": [{"name": "b", "text": NOTES}]})
    assert more["parent"] == made["id"] and more["documents"] == ["a", "b"]
    assert kept.ask(more["id"], CAPTAIN)[0] == "Orla Brandt" and kept.ask(more["id"])[0] == "48213"
    assert kept.send("GET", f"/{made['id']}") == made and kept.ask(made["id"])[0] == "48213"
    kept.send("DELETE", f"/{made['id']}")
    kept.live.service.engine.scheduler.tree.clear()
    text, usage = kept.ask(more["id"], CAPTAIN)
    assert text == "Orla Brandt" and usage.prompt_tokens_details.cached_tokens == more["tokens"]


def test_a_fork_stays_when_its_original_goes(kept):
    made = kept.create()
    twin = kept.send("POST", f"/{made['id']}/fork", {"pinned": True})
    assert twin["parent"] == made["id"] != twin["id"] and twin["expires_at"] is None
    assert kept.send("DELETE", f"/{made['id']}") == {
        "id": made["id"],
        "object": "context.deleted",
        "deleted": True,
    }
    assert kept.refused("GET", f"/{made['id']}")["code"] == "context_not_found"
    kept.live.service.engine.scheduler.tree.clear()
    assert kept.ask(twin["id"])[0] == "48213"
    assert names(kept.live) == [twin["id"], f"{twin['id']}.json"]


def test_limits(start, tmp_path):
    options = ServerOptions(
        max_contexts_per_key=2, max_body_bytes=1 << 16, max_prompt_tokens=2000, context_seconds=0, **QUICK
    )
    client = Client(start(options, contexts=tmp_path / "kept"))
    assert client.create({"text": "x" * (1 << 16)}, status=413)["error"]["code"] == "request_too_large"
    assert client.create({"text": "a b " * 4000}, status=400)["error"]["code"] == "context_length_exceeded"
    first, second = client.create(), client.create()
    assert first["ttl"] is None and first["expires_at"] is None
    for error in (
        client.create(status=400)["error"],
        client.refused("POST", f"/{first['id']}/fork", {}, 400),
        client.refused("POST", f"/{first['id']}/extend", {"documents": [{"text": "x"}]}, 400),
    ):
        assert error["code"] == "context_quota_exceeded" and "delete some" in error["message"]
    client.send("DELETE", f"/{second['id']}")
    assert client.create()["tokens"]
    tight = ServerOptions(max_context_bytes_per_key=100_000, **QUICK)
    client = Client(start(tight, contexts=tmp_path / "other"))
    error = client.create({"text": DOCUMENT * 4}, status=400)["error"]
    assert error["code"] == "context_quota_exceeded" and "100,000" in error["message"]
    assert names(client.live) == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": [{"text": " \n"}]}, "documents[0].text"),
        ({"documents": [{"text": "a\0b"}]}, "documents[0].text"),
        ({"documents": [{"text": 1}]}, "documents[0].text"),
        ({"documents": [{"text": "x", "path": "/etc/passwd"}]}, "documents[0].path"),
        ({"documents": [{"text": "x"}], "ttl": 0}, "ttl"),
        ({"documents": [{"text": "x"}], "ttl": 1e9}, "ttl"),
        ({"documents": [{"text": "x"}], "pinned": "yes"}, "pinned"),
        ({"documents": [{"text": "x"}], "id": "ctx_mine"}, "id"),
    ],
)
def test_wrong_requests_name_the_field(shared, body, param):
    error = shared.refused("POST", "", {"model": "small", **body}, 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_random_values_in_every_field(shared):
    """Any value in any place: a context or a refusal in shape."""
    rng, odd = random.Random(0), [True, -1, 0, 1e308, 10**400, 0.5, "", "x", "\0", [], [None], {}, {"a": 1}]
    document = {"name": "n", "text": "t"}
    made = shared.create()["id"]
    for _ in range(60):
        body = {"documents": [dict(document)], "ttl": 5, "pinned": False, "stream": False, "context": "x"}
        place = rng.choice([body, body["documents"][0]])
        place[rng.choice(list(place))] = rng.choice(odd)
        del body[rng.choice(list(body))]
        for method, path in (
            ("POST", "/v1/contexts"),
            ("POST", f"/v1/contexts/{made}/extend"),
            ("POST", f"/v1/contexts/{made}/fork"),
            ("PATCH", f"/v1/contexts/{made}"),
            ("POST", "/v1/chat/completions"),
        ):
            sent = body | ({} if made in path else {"model": "small"})
            if path.endswith("completions"):
                sent |= {"messages": [{"role": "user", "content": "Who?"}], "context": rng.choice(odd)}
                sent.pop("documents", None)
            answer = shared.http.request(
                method, path, content=json.dumps(sent), headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_no_name_leads_out_of_the_folder(shared):
    for name in (
        "..",
        "%2e%2e%2fkeys.json",
        "ctx_x",
        "ctx_" + "A" * 32,
        "x" * 500,
        "ctx_" + "0" * 32 + ".json",
    ):
        answer = shared.http.get(f"/v1/contexts/{name}")
        assert answer.status_code in (404, 405) and answer.json()["error"]["code"], answer.text
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            shared.ask(name)
    assert shared.http.request("PATCH", "/v1/contexts/x", content=b"{}").status_code == 415


def test_a_server_without_a_folder_says_how_to_get_one(live):
    client = Client(live)
    for method, path in (("GET", ""), ("GET", "/ctx_x"), ("DELETE", "/ctx_x")):
        error = client.refused(method, path)
        assert error["code"] == "contexts_disabled" and "--contexts" in error["message"]
    assert client.create(status=404)["error"]["code"] == "contexts_disabled"
    with pytest.raises(openai.NotFoundError, match="--contexts"):
        client.ask("ctx_x")


def test_a_stream_goes_on_while_a_context_is_read(kept):
    with openai.OpenAI(base_url=f"{kept.live.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="small", prompt="import os\n", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        made = kept.create({"text": FILLER * 1000})
        assert made["tokens"] > 5000 and kept.live.service.loop.stats.running  # the stream is not at its end
        stream.close()


def test_files_are_read_as_the_command_line_reads_them(shared):
    """`data` instead of `text`: a PDF, a text in UTF-16; what is missing of one is said."""
    pdf = make_pdf([[NOTES.strip()], []])
    made = shared.create({"name": "scan.pdf", "data": base64.b64encode(pdf).decode()})
    assert made["notes"] and made["notes"][0].startswith("scan.pdf: ")
    assert shared.ask(made["id"], CAPTAIN)[0] == "Orla Brandt"
    wide = base64.b64encode("\ufeff".encode("utf-16-le") + DOCUMENT.encode("utf-16-le")).decode()
    made = shared.create({"name": "wide", "data": wide})
    assert "notes" not in made and shared.ask(made["id"])[0] == "48213"
    for part, code in (
        ({"data": base64.b64encode(b"\x00\x01" * 9).decode()}, "unreadable_document"),
        ({"data": base64.b64encode(b"caf\xe9").decode()}, "unreadable_document"),
        ({"data": "no base64!"}, "invalid_value"),
        ({"data": "YQ==", "text": "a"}, None),
        ({}, None),
    ):
        assert shared.create({"name": "x", **part}, status=400)["error"]["code"] == code


def test_the_server_says_what_it_is(shared):
    told = shared.http.get("/v1/server").json()
    assert told["model"] == "small" and told["contexts"] and told["dense_len"] == 4096
    memory = told["memory"]
    assert 0 < memory["cache_used_bytes"] <= memory["cache_bytes"] < memory["process_bytes"] * 1000
