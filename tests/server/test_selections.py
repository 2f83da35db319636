"""Where the model looked, over HTTP: what was selected for an answer, and its text; for one key alone."""

import openai
import pytest

from opensala.contexts.passages import passage
from opensala.engine import Document, Engine, SamplingParams
from opensala.engine.ask import build_prompt
from opensala.server import KeyFile, new_key
from opensala.server.selections import Selections

from .conftest import FILLER, OPTIONS, QUESTION, Live
from .test_contexts import Client

FACT = "The access code for the north gate is 48213.\n"
LONG = FILLER * 250 + FACT + FILLER * 350
ALWAYS = {"first_blocks": 1, "last_blocks": 9}


class Looking(Client):
    """A client that asks where the model looked."""

    def look(self, context, stream=False, question=QUESTION, **fields):
        with openai.OpenAI(base_url=f"{self.live.url}/v1", api_key=self.key, max_retries=0) as client:
            done = client.chat.completions.create(
                model="small",
                messages=[{"role": "user", "content": question}],
                stream=stream,
                extra_body={"context": context, "selection": True, **fields},
            )
            return list(done)[-1].id if stream else done.id

    def get(self, path, status=200):
        answer = self.http.get(f"/v1/{path}")
        assert answer.status_code == status, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def looking(model, tmp_path_factory):
    server = Live(
        Engine(model.model, model.tokenizer, OPTIONS), contexts=tmp_path_factory.mktemp("looks") / "kept"
    )
    yield Looking(server)
    server.stop()


@pytest.fixture(scope="module")
def long(looking):
    return looking.create({"name": "report", "text": LONG})


@pytest.mark.parametrize("stream", [False, True])
def test_the_selection_of_an_answer(looking, long, model, stream):
    found = looking.get(f"selections/{looking.look(long['id'], stream)}")
    assert found["object"] == "selection" and found["context"] == long["id"]
    assert found["document_tokens"] == long["tokens"] < found["prompt_tokens"]
    assert (found["layers"], found["block_size"], found["always"]) == ([2, 6, 10], 64, ALWAYS)
    assert "".join(t["text"] for t in found["tokens"]).strip() == "48213" and not found["truncated"]
    first = found["prompt_tokens"] - 1
    assert [t["position"] for t in found["tokens"]] == list(
        range(first, first + len(found["tokens"]))
    )  # each by the token before it

    ids, _ = build_prompt(model, [Document("report", LONG)], QUESTION)
    (done,) = Engine(model.model, model.tokenizer, OPTIONS).generate(
        [ids], SamplingParams(max_tokens=len(found["tokens"]), selection=len(found["tokens"]))
    )
    for told, chosen in zip(found["tokens"], done.selection, strict=True):
        own = chosen.position // 64
        for layer, heads in zip(found["layers"], told["chosen"], strict=True):
            always = {0, *range(own - 8, own + 1)}
            wanted = [sorted(set(head.tolist()) - always) for head in chosen.blocks[layer]]
            assert heads == wanted and len(heads) == 1 and len(heads[0]) == 24 - len(always)


def test_the_block_that_holds_the_fact_was_selected(looking, long):
    found = looking.get(f"selections/{looking.look(long['id'])}")
    chosen = {b for t in found["tokens"] for heads in t["chosen"] for head in heads for b in head}
    texts = {
        b: looking.get(f"contexts/{long['id']}/text?start={64 * b}&end={64 * b + 64}&around=32")
        for b in chosen
    }
    holding = [b for b, text in texts.items() if "48213" in text["text"]]
    assert holding and len(chosen) < long["tokens"] // 64
    one = texts[holding[0]]
    assert one["before"] + one["text"] + one["after"] in LONG


def test_a_short_document_is_read_as_a_whole(looking):
    made = looking.create({"name": "note", "text": FACT + FILLER * 20})
    found = looking.get(f"selections/{looking.look(made['id'])}")
    assert found["tokens"] and all(t["chosen"] is None for t in found["tokens"])


def test_what_is_refused(looking, long):
    for context, fields, what in ((long["id"], {"n": 2}, "n"), (None, {}, "selection")):
        with pytest.raises(openai.BadRequestError) as caught:
            looking.look(context, **fields)
        assert caught.value.param == what
    assert looking.get("selections/chatcmpl-none", 404)["error"]["code"] == "selection_not_found"
    place = f"contexts/{long['id']}/text"
    for query, param in (
        ("end=3", "start"),
        ("start=-1&end=3", "start"),
        ("start=0&end=5000", "end"),
        ("start=x&end=3", "start"),
        ("start=0&end=3&around=9999999999", "around"),
    ):
        assert looking.get(f"{place}?{query}", 400)["error"]["param"] == param
    size = long["tokens"]
    for query in ("start=3&end=3", f"start={size - 3}&end={size + 1}"):
        assert "start" in looking.get(f"{place}?{query}", 400)["error"]["message"]
    looking.get("contexts/ctx_0/text?start=0&end=1", 404)
    looking.get("contexts/ctx_0/documents", 404)
    without = looking.http.post(
        "/v1/chat/completions",
        json={"model": "small", "messages": [{"role": "user", "content": "Hi?"}], "selection": "yes"},
    )
    assert without.status_code == 400


def test_a_selection_belongs_to_its_key(start, tmp_path):
    path = tmp_path / "keys.json"
    tokens = {name: new_key(path, name)[1] for name in ("ada", "bob")}
    live = start(keys=KeyFile(path), contexts=tmp_path / "kept")
    ada, bob = (Looking(live, tokens[name]) for name in ("ada", "bob"))
    made = ada.create({"name": "note", "text": FACT})
    answer = ada.look(made["id"])
    assert ada.get(f"selections/{answer}")["context"] == made["id"]
    refused = [bob.get(f"selections/{name}", 404)["error"]["message"] for name in (answer, "x")]
    assert refused[0].replace(answer, "x") == refused[1], "that it is another's is not told"
    bob.get(f"contexts/{made['id']}/text?start=0&end=1", 404)
    bob.get(f"contexts/{made['id']}/documents", 404)


def test_what_is_kept_is_bounded_and_expires(model, monkeypatch):
    now = [1000.0]
    store = Selections(model, lambda: now[0])
    assert store.limit == (4 << 20) // (4 * 3 * 24)
    asked = type("Asked", (), {"selection": True, "context": "ctx", "n": 1})()
    kept = type("Kept", (), {"tokens": [1] * 5000})()
    (done,) = Engine(model.model, model.tokenizer, OPTIONS).generate(
        [[5] * 4200], SamplingParams(max_tokens=3, selection=3, ignore_eos=True)
    )
    for n in range(40):
        store.watch("ada" if n % 2 else "bob", asked, 5000, kept).keep(f"answer-{n}", done)
    size = store.num_bytes // 40
    assert size > 3 * 3 * 24 * 4
    monkeypatch.setattr("opensala.server.selections._PER_KEY", 5)
    store.watch("ada", asked, 5000, kept).keep("last", done)
    assert store.get("ada", "last") and store.num_bytes == (5 + 20) * size
    monkeypatch.setattr("opensala.server.selections._TOTAL_BYTES", 3 * size)
    store.watch("ada", asked, 5000, kept).keep("later", done)
    assert store.num_bytes == 3 * size
    now[0] += 3600
    with pytest.raises(Exception, match="60 minutes"):
        store.get("ada", "later")
    assert store.num_bytes == 0


@pytest.mark.parametrize("around", [0, 1, 7, 500])
def test_passages_put_together_are_the_text(model, around):
    """Characters of several tokens stay whole, wherever a text is cut."""
    text = "Grüße, 你好 🙂! " * 12
    ids = model.tokenizer(text)["input_ids"]
    for size in (1, 3, 64):
        parts = [
            passage(model.tokenizer, ids, at, min(at + size, len(ids)), around)
            for at in range(0, len(ids), size)
        ]
        assert "\ufffd" not in "".join(map("".join, parts))
        assert all("".join(part) in text for part in parts)
        if around > 6:
            assert "".join(part.text for part in parts) == text


def test_documents_are_found_among_the_tokens(looking):
    texts = [("a.txt", FILLER * 40), ("b.txt", FACT * 30), ("c.txt", "é" * 200 + FILLER * 9)]
    made = looking.create(*({"name": name, "text": text} for name, text in texts[:2]))
    more = looking.send(
        "POST", f"/{made['id']}/extend", {"documents": [{"name": texts[2][0], "text": texts[2][1]}]}
    )
    found = looking.get(f"contexts/{more['id']}/documents")["data"]
    assert [d["name"] for d in found] == ["a.txt", "b.txt", "c.txt"]
    assert found[0]["start"] == 0 and found[-1]["end"] == more["tokens"]
    for one, (_, text) in zip(found, texts, strict=True):
        middle = (one["start"] + one["end"]) // 2
        part = looking.get(f"contexts/{more['id']}/text?start={middle}&end={middle + 9}")["text"]
        assert part in text
    single = looking.create({"name": "only", "text": FACT})
    assert looking.get(f"contexts/{single['id']}/documents")["data"] == [
        {"name": "only", "start": 0, "end": single["tokens"]}
    ]
