"""Limits and safety of a live server: keys, rates, slow readers, disconnects, fairness, the end."""

import contextlib
import json
import socket
import threading
import time

import anthropic
import httpx2
import openai
import pytest

from opensala.server import KeyFile, ServerOptions, build_server, is_loopback, new_key, revoke_key
from opensala.server.errors import ApiError
from opensala.server.limits import Gate

from .conftest import DOCUMENT, QUESTION

QUICK = {"grace_seconds": 0}
LONG = {"model": "small", "prompt": "import os\n", "max_tokens": 30_000, "extra_body": {"ignore_eos": True}}


def client(live, key="none"):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, timeout=60)


def request(body):
    """The bytes of a completion request."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.fixture
def keyed(start, tmp_path):
    path = tmp_path / "keys.json"
    secrets = {name: new_key(path, name)[1] for name in ("ada", "bob")}
    live = start(ServerOptions(**QUICK), KeyFile(path))
    return live, secrets, path


def test_without_a_key_nothing_is_told(keyed):
    live, secrets, path = keyed
    for wrong in ("sala-wrong", "-", secrets["ada"][:-1]):
        headers = {"authorization": f"Bearer {wrong}"}
        for url in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            answer = httpx2.get(live.url + url, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx2.get(f"{live.url}/health").status_code == 200
    with pytest.raises(anthropic.AuthenticationError) as caught:
        anthropic.Anthropic(base_url=live.url, api_key="x", max_retries=0).models.list()
    assert caught.value.body["error"]["type"] == "authentication_error"
    with pytest.raises(openai.AuthenticationError):
        client(live).models.list()
    assert client(live, secrets["ada"]).models.list().data[0].id == "small"
    assert anthropic.Anthropic(base_url=live.url, api_key=secrets["bob"]).models.list().data[0].id == "small"
    revoke_key(path, "ada")
    with pytest.raises(openai.AuthenticationError):
        client(live, secrets["ada"]).models.list()


def test_what_one_key_read_does_not_show_to_another(keyed):
    live, secrets, _ = keyed
    cached = []
    for name in ("ada", "ada", "bob"):
        ask = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]
        done = client(live, secrets[name]).chat.completions.create(model="small", messages=ask)
        cached.append(done.usage.prompt_tokens_details.cached_tokens)
        why = done.usage.model_extra["opensala"]["read_because"]
    assert (
        cached[0] == cached[2] == 0 < cached[1]
        and why == "this text was not read before, or is no longer at hand"
    )


def test_a_busy_key_does_not_keep_another_one_out(keyed):
    """Many long requests of one key, then a short one of another: it is answered while most of them wait."""
    live, secrets, _ = keyed
    ada, bob = client(live, secrets["ada"]), client(live, secrets["bob"])
    done = []

    def one():
        ada.completions.create(**{**LONG, "max_tokens": 150})
        done.append(1)

    threads = [threading.Thread(target=one) for _ in range(24)]
    for thread in threads:
        thread.start()
    live.wait(lambda: live.service.loop.stats.waiting >= 12)
    bob.completions.create(model="small", prompt="def ", max_tokens=1)
    before = len(done)
    for thread in threads:
        thread.join()
    assert before <= 10 and len(done) == 24


def test_requests_in_flight_are_limited(start):
    live = start(ServerOptions(max_requests_per_key=2, **QUICK))
    api = client(live)
    streams = [api.completions.create(**LONG, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        api.completions.create(model="small", prompt="a", max_tokens=1)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.body["code"] == "rate_limit_exceeded"
    with pytest.raises(anthropic.RateLimitError) as refused:
        anthropic.Anthropic(base_url=live.url, api_key="x", max_retries=0).messages.create(
            model="small", max_tokens=1, messages=[{"role": "user", "content": "a"}]
        )
    assert refused.value.body["error"]["type"] == "rate_limit_error"
    for stream in streams:
        stream.close()
    live.wait(lambda: not live.service.gate.num_inside)
    assert api.completions.create(model="small", prompt="a", max_tokens=1).choices


def test_the_official_clients_wait_as_long_as_they_are_told(start):
    live = start(ServerOptions(requests_per_minute=60, **QUICK))
    api = client(live)
    for _ in range(60):
        live.service.gate._spend("")
    began = time.monotonic()
    assert api.with_options(max_retries=3).completions.create(model="small", prompt="a", max_tokens=1).choices
    assert time.monotonic() - began > 0.5


def test_the_gate():
    now = [0.0]
    gate = Gate(ServerOptions(max_requests=3, max_requests_per_key=2, requests_per_minute=60), lambda: now[0])

    def refused(owner):
        with pytest.raises(ApiError) as caught:
            gate.enter(owner)
        assert caught.value.status == 429
        return caught.value.retry_after

    gate.enter("a"), gate.enter("a"), refused("a")
    gate.enter("b")
    assert refused("b") == 2 and gate.num_inside == 3
    for owner in "aab":
        gate.leave(owner)
    for _ in range(58):
        gate.enter("a"), gate.leave("a")
    assert refused("a") == 1
    gate.enter("b"), gate.leave("b")  # another key's allowance is its own
    now[0] += 1.01
    gate.enter("a"), gate.leave("a")
    assert refused("a") == 1 and not gate.num_inside


@pytest.mark.parametrize(
    "wrong",
    [{"max_body_bytes": 0}, {"request_seconds": 0}, {"requests_per_minute": -1}, {"max_prompt_tokens": 0}],
)
def test_options_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerOptions(**wrong)


def test_long_prompts_and_long_requests(start):
    live = start(ServerOptions(max_prompt_tokens=100, request_seconds=0.3, **QUICK))
    api = client(live)
    with pytest.raises(openai.BadRequestError, match="this server reads 100"):
        api.completions.create(model="small", prompt="word " * 200)
    with pytest.raises(openai.APIStatusError) as caught:
        api.completions.create(**LONG)
    assert caught.value.status_code == 504 and caught.value.body["code"] == "timeout"
    with pytest.raises(openai.APIError, match="longer than 0.3 s"):
        for _ in api.completions.create(**LONG, stream=True):
            pass
    live.wait(lambda: not live.service.loop.stats.running)


def test_a_stream_shows_life_while_a_long_prompt_is_read(start):
    live = start(ServerOptions(ping_seconds=0.05, **QUICK))
    text = "Nothing of note happened that day. " * 500 + "\n\nWho?"
    asked = {
        "model": "small",
        "stream": True,
        "max_tokens": 2,
        "messages": [{"role": "user", "content": text}],
    }
    for path, life in (("/v1/chat/completions", ": still at work"), ("/v1/messages", "event: ping")):
        changed = json.loads(json.dumps(asked).replace("Nothing", f"Nothing {path}"))
        with httpx2.stream("POST", live.url + path, json=changed, timeout=60) as answer:
            lines = list(answer.iter_lines())
        assert lines.count(life) > 2, path
        assert lines[-2] == ("data: [DONE]" if "chat" in path else 'data: {"type":"message_stop"}')


def test_a_client_that_goes_away_frees_its_memory(live):
    sent = request({**LONG, **LONG["extra_body"], "extra_body": None})
    live.wait_until_idle()
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(sent)  # waits for a whole answer
        live.wait(lambda: live.service.loop.stats.running == 1)
    live.wait(lambda: not live.service.loop.stats.running, 5)
    live.wait(lambda: not live.service.gate.num_inside, 5)


def test_a_slow_reader_is_cut_off(start):
    """It takes nothing; when its buffers are full, its request ends and its connection is dropped."""
    live = start(ServerOptions(write_seconds=0.3, **QUICK))
    asked = {
        "model": "small",
        "prompt": "import os\n",
        "max_tokens": 30_000,
        "stream": True,
        "ignore_eos": True,
    }
    asked |= {"logprobs": 20, "n": 8}  # many bytes for each token
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", live.port))
        connection.sendall(request(asked))
        live.wait(lambda: live.service.loop.stats.running == 8)
        live.wait(lambda: not live.service.loop.stats.running, 60)
        live.wait(lambda: not live.service.gate.num_inside, 5)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 20):
                got += data
    assert got.startswith(b"HTTP/1.1 200") and b"[DONE]" not in got and not got.endswith(b"\r\n0\r\n\r\n")


def test_streams_end_cleanly_when_the_server_stops(model, start):
    """A short one comes to its end, a long one ends with an error in shape, and new ones are refused."""
    live = start(ServerOptions(grace_seconds=1.5))
    api = client(live)
    short = api.completions.create(**{**LONG, "max_tokens": 100}, stream=True)
    long = api.completions.create(**LONG, stream=True)
    message = anthropic.Anthropic(base_url=live.url, api_key="x", max_retries=0)
    next(iter(short)), next(iter(long))
    live.server.should_exit = True
    assert list(short)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIError, match="shutting down"):
        for _ in long:
            pass
    live.thread.join(30)
    assert not live.thread.is_alive()
    with pytest.raises(anthropic.APIConnectionError):
        message.models.list()


def test_what_can_be_reached_from_elsewhere_needs_keys(model, tmp_path):
    from opensala.engine import Engine, EngineOptions
    from opensala.server import Service

    engine = Engine(model.model, model.tokenizer, EngineOptions(max_cached_tokens=1000))
    for host in ("0.0.0.0", "::", "192.168.0.5", "example.org", ""):
        with pytest.raises(ValueError, match="no API keys"):
            build_server(Service(engine, "small"), host)
    path = tmp_path / "keys.json"
    new_key(path, "ada")
    assert build_server(Service(engine, "small", keys=KeyFile(path)), "0.0.0.0").config.host == "0.0.0.0"
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    with pytest.raises(ValueError, match="port must be"):
        build_server(Service(engine, "small"), port=70_000)


def test_many_clients_that_come_go_and_vanish(start):
    """Pages, slots and counts return to where they were; nothing fails but for stated limits."""
    live = start(ServerOptions(max_requests_per_key=20, **QUICK))
    statuses, rounds = [], 12

    def one(n):
        with httpx2.Client(base_url=live.url, timeout=60) as http:
            for i in range(rounds):
                body = {"model": "small", "prompt": f"def f{n}_{i}(", "max_tokens": 1 + 5 * ((n + i) % 5)}
                if (n + i) % 3:
                    statuses.append(http.post("/v1/completions", json=body).status_code)
                    continue
                body |= {"stream": True, "max_tokens": 500, "ignore_eos": True}
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    statuses.append(answer.status_code)
                    for _ in zip(range(3), answer.iter_lines(), strict=False):
                        pass

    threads = [threading.Thread(target=one, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 24 * rounds and set(statuses) <= {200, 429}
    live.wait_until_idle()
    live.wait(lambda: not live.service.gate.num_inside)
