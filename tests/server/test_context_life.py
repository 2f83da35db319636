"""How contexts end, and what is left of them: expiry, clients that go away, servers that stop, disks that
fail, damage."""

import base64
import json
import pkgutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from opensala.contexts.folder import ContextFolder
from opensala.contexts.kept import Kept
from opensala.contexts.shelf import Record, Shelf
from opensala.server import ServerOptions

from ..pdfs import long_pdf, pdf_processes
from .conftest import DOCUMENT, FILLER
from .test_contexts import CAPTAIN, NOTES, QUICK, REPORT, Client, names


@pytest.fixture
def kept(start, tmp_path):
    return Client(start(contexts=tmp_path / "kept"))


def test_a_context_outlives_its_server(start, tmp_path, monkeypatch):
    monkeypatch.setattr("opensala.contexts.kept._SEGMENT_PAGES", 20)  # several segments
    first = Client(start(contexts=tmp_path / "kept"))
    made = first.create({"text": DOCUMENT + FILLER * 400 + NOTES})
    wanted = first.ask(made["id"], CAPTAIN)[0]
    first.live.stop()
    second = Client(start(contexts=tmp_path / "kept"))
    assert second.send("GET")["data"] == [made]
    text, usage = second.ask(made["id"], CAPTAIN)
    assert text == wanted == "Orla Brandt"
    assert usage.prompt_tokens_details.cached_tokens == made["tokens"]
    more = second.send("POST", f"/{made['id']}/extend", {"documents": [{"text": "More.\n"}]})
    assert second.ask(more["id"], CAPTAIN)[0] == "Orla Brandt"


def test_contexts_expire_unless_they_are_pinned(kept):
    shelf, now = kept.live.service.keeper.shelf, time.time()
    short, long, pinned = (kept.create(ttl=ttl) for ttl in (10, 1000, 10))
    changed = kept.send("PATCH", f"/{pinned['id']}", {"pinned": True})
    assert changed == {**pinned, "pinned": True, "expires_at": None}
    shelf.clock = lambda: now + 500
    assert kept.refused("GET", f"/{short['id']}")["code"] == "context_not_found"
    assert [c["id"] for c in kept.send("GET")["data"]] == sorted([long["id"], pinned["id"]])
    renewed = kept.send("PATCH", f"/{long['id']}", {"ttl": 1000})
    assert renewed["expires_at"] == int(now + 500) + 1000
    assert shelf.sweep() == 1
    left = [f"{i}{end}" for i in (long["id"], pinned["id"]) for end in ("", ".json")]
    assert names(kept.live) == sorted(left)
    kept.send("PATCH", f"/{pinned['id']}", {"pinned": False})
    assert kept.refused("GET", f"/{pinned['id']}")["code"] == "context_not_found"


def test_a_client_that_goes_away_leaves_nothing(kept):
    live = kept.live
    body = json.dumps({"model": "small", "documents": [{"text": FILLER * 3000}]}).encode()
    head = b"POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for share in (len(body) // 2, len(body)):
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:share])
            if share == len(body):
                live.wait(lambda: live.service.loop.stats.running)
        live.wait_until_idle()
    live.wait(lambda: not live.service.gate.num_inside)
    assert names(live) == [] and kept.send("GET")["data"] == []


def test_a_client_that_goes_away_while_it_is_written_leaves_nothing(kept, monkeypatch):
    live, add = kept.live, ContextFolder.add_segment

    def slow(*args):
        time.sleep(0.5)
        return add(*args)

    monkeypatch.setattr(ContextFolder, "add_segment", slow)
    body = json.dumps({"model": "small", "documents": [REPORT]}).encode()
    head = b"POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        live.wait(lambda: names(live))
    live.wait(lambda: not names(live))
    assert kept.send("GET")["data"] == []


def test_a_server_that_stops_ends_what_is_read_and_leaves_nothing_of_it(start, tmp_path):
    live = start(ServerOptions(**QUICK), contexts=tmp_path / "kept")
    body = {"model": "small", "documents": [{"text": FILLER * 4000}], "stream": True}
    with Client(live).http.stream("POST", "/v1/contexts", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert "context.progress" in next(lines)
        live.server.should_exit = True
        assert "shutting down" in list(lines)[-1]
    live.stop()
    assert names(live) == []


def test_a_server_that_stops_keeps_what_is_being_written(start, tmp_path, monkeypatch):
    live, add = start(ServerOptions(grace_seconds=5), contexts=tmp_path / "kept"), ContextFolder.add_segment

    def slow(*args):
        live.server.should_exit = True
        time.sleep(0.3)
        return add(*args)

    monkeypatch.setattr(ContextFolder, "add_segment", slow)
    monkeypatch.setattr("opensala.contexts.kept._SEGMENT_PAGES", 20)
    made = Client(live).create({"text": DOCUMENT + FILLER * 400})  # several segments
    live.stop()
    assert names(live) == [made["id"], f"{made['id']}.json"]


def test_servers_share_a_folder(start, tmp_path):
    one, two = (Client(start(contexts=tmp_path / "kept")) for _ in range(2))
    made = one.create()
    assert two.ask(made["id"])[0] == "48213"
    two.send("DELETE", f"/{made['id']}")
    assert one.refused("GET", f"/{made['id']}")["code"] == "context_not_found"


@pytest.mark.parametrize(
    "place, path, body",
    [
        ("server.keeping.Kept", "/{}/fork", {}),  # before it is opened
        ("server.keeping.Draft", "/{}/extend", {"documents": [{"text": NOTES}]}),  # before its text is read
        ("contexts.kept.Draft.begin", "/{}/extend", {"documents": [{"text": NOTES}]}),  # before it is linked
        ("contexts.shelf.ContextFolder.open", "/{}/fork", {}),
        ("contexts.shelf.Shelf.put", "/{}", {"ttl": 50}),
    ],
)
def test_a_context_that_is_removed_meanwhile_is_not_there(kept, monkeypatch, place, path, body):
    made, inner = kept.create(), pkgutil.resolve_name(f"opensala.{place}")
    if "server" not in place or "Draft" in place:
        kept.ask(made["id"])  # it has been opened
    root = kept.live.service.keeper.shelf.root

    def outer(*args, **options):
        Shelf(root).remove(made["id"])  # by another server of the same folder
        return inner(*args, **options)

    monkeypatch.setattr(f"opensala.{place}", outer)
    if "put" in place:  # it could not be known any more
        kept.send("PATCH", path.format(made["id"]), body)
    else:
        assert kept.refused("POST", path.format(made["id"]), body)["code"] == "context_not_found"
    assert kept.refused("GET", f"/{made['id']}")["code"] == "context_not_found"
    kept.live.service.keeper.shelf.sweep()
    assert names(kept.live) == []


def test_a_question_about_a_context_that_is_removed_meanwhile(kept, monkeypatch):
    made, inner = kept.create(), Kept._text

    def text(self):
        kept.live.service.keeper.shelf.remove(made["id"])
        return inner(self)

    monkeypatch.setattr(Kept, "chat", lambda self, *_, **__: self._text())  # its tokens do not do
    monkeypatch.setattr(Kept, "_text", text)
    with pytest.raises(openai.NotFoundError, match="no context"):
        kept.ask(made["id"])


def test_two_changes_at_a_time_both_hold(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path)
    record = Record(shelf.new_id(), "", "m", "f", 1, 1, [], created=0, ttl=None, renewed=0)
    shelf.folder(record.id).mkdir()
    shelf.put(record)
    put = Shelf.put

    def slow(self, changed):
        time.sleep(0.1)
        put(self, changed)

    monkeypatch.setattr(Shelf, "put", slow)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda fields: shelf.change(record.id, "", fields), ({"pinned": True}, {"ttl": 50})))
    found = shelf.get(record.id, "")
    assert found.pinned and found.ttl == 50 and found.renewed > 0
    shelf.remove(record.id)
    assert shelf.change(record.id, "", {"ttl": 5}) is None and not list(tmp_path.iterdir())


def test_a_disk_that_fails_leaves_nothing_and_tells_no_path(kept, monkeypatch):
    def full(*_):
        raise ValueError("/secret/place is full")

    with monkeypatch.context() as patch:
        patch.setattr(ContextFolder, "add_segment", full)
        error = kept.create(status=500)["error"]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert names(kept.live) == [] and kept.create()["tokens"]


def test_what_was_never_finished_is_swept(tmp_path):
    shelf = Shelf(tmp_path)
    path = shelf.folder(shelf.new_id())
    path.mkdir()
    (path / "segment-00001.safetensors").write_bytes(b"part")
    (tmp_path / "mine").mkdir()
    assert shelf.sweep() == 1 and [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_damaged_files_do_not_reach_an_answer(kept):
    made = kept.create({"text": DOCUMENT + FILLER * 400})
    shelf, live = kept.live.service.keeper.shelf, kept.live
    (segment,) = shelf.folder(made["id"]).glob("segment-*")
    data = bytearray(segment.read_bytes())
    whole = bytes(data)
    data[-(len(data) // 4) :] = bytes(len(data) // 4)  # keys and values of the last layers
    segment.write_bytes(data)
    live.service.engine.scheduler.tree.clear()
    with pytest.raises(openai.InternalServerError, match="DamagedContext"):
        kept.ask(made["id"])
    text, usage = kept.ask(made["id"])  # from now on it is read from its text
    assert text == "48213" and usage.prompt_tokens_details.cached_tokens == 0
    more = kept.send("POST", f"/{made['id']}/extend", {"documents": [{"text": NOTES}]})
    live.service.engine.scheduler.tree.clear()
    text, usage = kept.ask(more["id"], CAPTAIN)  # nothing damaged got into it
    assert text == "Orla Brandt" and usage.prompt_tokens_details.cached_tokens == more["tokens"]
    live.service.keeper._open.clear()
    segment.write_bytes(whole[:-1])  # its length is wrong: it is not even opened
    with pytest.raises(openai.InternalServerError, match="could not be read"):
        kept.ask(made["id"])
    assert live.service.loop.is_alive and kept.ask(more["id"])[0] == "48213"
    for text_file in shelf.folder(more["id"]).glob("text-*"):
        text_file.write_bytes(b"[]")
    body = {"documents": [{"text": "x"}]}
    error = kept.refused("POST", f"/{more['id']}/extend", body, 500)
    assert str(shelf.root) not in error["message"] and "could not be read" in error["message"]


def test_a_pdf_is_read_beside_streams_and_no_longer_than_its_client_waits(kept):
    part = {"name": "a", "data": base64.b64encode(long_pdf()).decode()}
    body = json.dumps({"model": "small", "documents": [part]}).encode()
    head = "POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with openai.OpenAI(base_url=f"{kept.live.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="small", prompt="a\n", max_tokens=30_000, stream=True, extra_body={"ignore_eos": True}
        )
        with socket.create_connection(("127.0.0.1", kept.live.port)) as upload:
            upload.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            kept.live.wait(pdf_processes)
            assert kept.live.service.loop.stats.running
        kept.live.wait(lambda: not pdf_processes(), 4)  # to its end it takes longer
        stream.close()
    assert kept.send("GET")["data"] == []


def test_a_server_that_stops_ends_a_pdf_that_is_read(start, tmp_path):
    live, answers = start(ServerOptions(**QUICK), contexts=tmp_path / "kept"), []
    part = {"name": "a", "data": base64.b64encode(long_pdf()).decode()}

    def upload():
        answers.append(Client(live).create(part, status=503)["error"])

    thread = threading.Thread(target=upload)
    thread.start()
    live.wait(pdf_processes)
    live.server.should_exit = True
    live.wait(lambda: not pdf_processes(), 2.5)  # neither its end nor that of uvicorn's patience
    live.stop()
    thread.join()
    assert names(live) == []
    (error,) = answers
    assert "shutting down" in error["message"] and error["code"] == "unavailable"


def test_a_request_that_is_not_over_when_the_server_is_gets_its_error(start, monkeypatch, tmp_path):
    live, answers, begun = start(ServerOptions(**QUICK), contexts=tmp_path / "kept"), [], threading.Event()
    live.server.config.timeout_graceful_shutdown = 0.2

    def slow(*_):
        begun.set()
        time.sleep(1.5)

    monkeypatch.setattr("opensala.server.keeping.Draft", slow)
    client = Client(live)
    thread = threading.Thread(target=lambda: answers.append(client.create(status=503)["error"]))
    thread.start()
    assert begun.wait(30)
    live.stop()
    thread.join()
    assert "shutting down" in answers[0]["message"]


def test_a_pdf_that_takes_longer_than_a_request_may(start, tmp_path):
    client = Client(start(ServerOptions(**QUICK, request_seconds=0.5), contexts=tmp_path / "kept"))
    part = {"name": "a", "data": base64.b64encode(long_pdf()).decode()}
    assert "longer than 0.5 s" in client.create(part, status=504)["error"]["message"]
    assert not pdf_processes()
