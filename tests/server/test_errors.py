"""Bad input over raw sockets and HTTP: refused in the shape of the API that was called, never a 500."""

import contextlib
import json
import random
import socket
import time

import httpx2
import pytest

from .conftest import DOCUMENT

CHAT = {"model": "small", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
]


@pytest.fixture(scope="module")
def http(live):
    with httpx2.Client(base_url=live.url, timeout=60) as client:
        yield client


def post(http, path, content, kind="application/json"):
    content = json.dumps(content) if isinstance(content, (dict, list, int)) else content
    return http.post(path, content=content, headers={"content-type": kind})


def check_shape(path, answer):
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and set(body["error"]) == {"type", "message"}
        assert body["request_id"] == answer.headers["request-id"]
    else:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and "/opensala" not in answer.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "\xe9"}',
        b'{"model": NaN}',
        b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": "\\ud800"}',
        b'{"\\ud800": 1}',
        b"[" * 100_000,
        b'{"model": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
        b"{}",
        b'{"model": null}',
        b'{"model": 5}',
        b'{"model": {"$ref": "x"}}',
    ],
)
def test_bodies_that_are_no_requests(http, path, content):
    answer = post(http, path, content)
    assert answer.status_code == 400
    check_shape(path, answer)


@pytest.mark.parametrize("path", PATHS)
def test_paths_methods_and_types(http, path):
    for answer, status in (
        (http.get(path), 405),
        (http.post(path + "/nothing", content="{}", headers={"content-type": "application/json"}), 404),
        (post(http, path, CHAT, "text/plain"), 415),
        (post(http, path, CHAT, "application/x-www-form-urlencoded"), 415),
        (http.post(path, content=b""), 415),
        (http.post(path, json=CHAT, headers={"content-encoding": "gzip"}), 415),
    ):
        assert answer.status_code == status
        check_shape(path, answer)


def test_random_values_in_every_field(http):
    """Any value in any place of a request: an answer or a refusal in shape."""
    rng = random.Random(0)
    odd = [
        None,
        True,
        -1,
        0,
        1e308,
        -1e308,
        10**400,
        0.5,
        "",
        "x",
        "\0",
        "\u2028😀",
        [],
        [[]],
        [None],
        {},
        {"a": 1},
    ]
    message = {"role": "user", "content": [{"type": "text", "text": "Who?"}]}
    fields = {
        "/v1/chat/completions": {
            "messages": [message],
            "max_tokens": 2,
            "stream_options": {},
            "stream": False,
        },
        "/v1/completions": {"prompt": "Who?", "max_tokens": 2, "stop": ["a"], "echo": False, "seed": 1},
        "/v1/responses": {"input": [message], "max_output_tokens": 2, "text": {"format": {"type": "text"}}},
        "/v1/messages": {"messages": [message], "max_tokens": 2, "system": [{"type": "text", "text": "a"}]},
        "/tokenize": {"messages": [message]},
    }
    names = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stop",
        "seed",
        "logprobs",
        "top_logprobs",
        "tools",
    ]
    names += ["metadata", "user", "stream", "include", "stop_sequences", "model"]
    for _ in range(600):
        path = rng.choice(list(fields))
        body = json.loads(json.dumps({"model": "small", **fields[path]}))
        if rng.random() < 0.5:
            body[rng.choice(names)] = rng.choice(odd)
        else:
            place = body
            while True:
                key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
                inner = place[key]
                if not inner or not isinstance(inner, (dict, list)) or rng.random() < 0.3:
                    place[key] = rng.choice(odd)
                    break
                place = inner
        answer = post(http, path, json.dumps(body))
        assert answer.status_code < 500, (path, body, answer.text)
        if answer.status_code != 200:
            check_shape(path, answer)


def test_a_body_that_is_too_large(start):
    from opensala.server import ServerOptions

    live = start(ServerOptions(max_body_bytes=10_000, grace_seconds=0))
    with httpx2.Client(base_url=live.url, timeout=60) as http:
        big = {**CHAT, "user": "x" * 10_000}
        for path in PATHS:
            answer = post(http, path, big)
            assert answer.status_code == 413
            check_shape(path, answer)

        def pieces():
            for _ in range(20):
                yield b"x" * 1000

        answer = http.post("/v1/messages", content=pieces(), headers={"content-type": "application/json"})
        assert answer.status_code == 413  # without a length announced
        check_shape("/v1/messages", answer)
        assert answer.json()["error"]["type"] == "request_too_large"
        assert post(http, "/v1/chat/completions", CHAT).status_code == 200


def talk(live, sent, more=None, shut=False):
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(sent)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        got = b""
        while data := connection.recv(65536):
            got += data
            if more and more in got:
                break
        return got


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http(live, sent):
    got = talk(live, sent, shut=True)
    assert not got or got.startswith((b"HTTP/1.1 4",)), got[:200]
    if got:
        assert set(json.loads(got.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert talk(live, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


def test_half_closed_and_half_sent(live):
    body = json.dumps(CHAT).encode()
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
    got = talk(live, HEAD + length + body[:20], shut=True)
    assert not got.startswith(b"HTTP/1.1 2")
    live.wait(lambda: not live.service.gate.num_inside)
    live.wait_until_idle()


def test_headers_that_come_too_slowly(start, monkeypatch):
    """A connection that sends no whole request is dropped; one that is in use is not."""
    monkeypatch.setattr("opensala.server.run._HEADER_SECONDS", 0.3)
    live = start()
    began = time.monotonic()
    for sent in (b"", b"GET /health HTTP/1.1\r\nX: a"):
        with contextlib.suppress(ConnectionResetError):
            assert talk(live, sent) == b""
    assert time.monotonic() - began < 10
    with httpx2.Client(base_url=live.url, timeout=60) as http:
        for _ in range(60):  # over one connection, in which a look often finds it between two requests
            assert http.get("/health").status_code == 200
            time.sleep(0.02)


def test_a_body_that_comes_too_slowly(start):
    from opensala.server import ServerOptions

    live = start(ServerOptions(body_seconds=0.2, grace_seconds=0))
    got = talk(live, HEAD + b"Content-Length: 50\r\n\r\n{", b"}}")
    assert got.startswith(b"HTTP/1.1 408") and b'"timeout"' in got
    live.wait(lambda: not live.service.gate.num_inside)


def test_names_that_a_page_in_a_browser_could_use(live):
    """DNS rebinding: a stranger's name that points to this machine; and forms, which need no permission."""
    for name, status in (
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("localhost:1", 200),
        ("[::1]:5", 200),
    ):
        answer = httpx2.get(f"{live.url}/health", headers={"host": name})
        assert answer.status_code == status, name
    answer = httpx2.options(f"{live.url}/v1/chat/completions", headers={"origin": "http://evil.example"})
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


def test_tokenize_health_and_metrics(http, live):
    answer = post(http, "/tokenize", {"prompt": "The quick brown fox"}).json()
    assert answer["tokens"] == live.service.engine.encode("The quick brown fox") and answer["count"] == len(
        answer["tokens"]
    )
    answer = post(
        http,
        "/tokenize",
        {"model": "small", "messages": [{"role": "user", "content": DOCUMENT + "\n\nWho?"}]},
    )
    assert answer.json()["count"] > 100
    assert post(http, "/tokenize", {"prompt": "a", "messages": CHAT["messages"]}).status_code == 400
    assert http.get("/health").json() == {"status": "ok"}
    post(http, "/v1/chat/completions", CHAT)
    text = http.get("/metrics").text
    assert 'opensala_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "opensala_pages_free" in text and "opensala_time_to_first_token_seconds_count" in text


def test_the_description_names_every_field(http):
    described = http.get("/openapi.json").json()
    schema = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert {"model", "messages", "temperature", "top_k", "stream"} <= set(schema["properties"])
    assert "$ref" not in json.dumps(schema)


def test_a_defect_of_ours_is_a_500_without_details(live, http, monkeypatch):
    def fail(*args):
        raise KeyError("a secret")

    monkeypatch.setattr(live.service, "check_model", fail)
    for path in ("/v1/chat/completions", "/v1/messages"):
        answer = post(http, path, CHAT)
        assert answer.status_code == 500 and "secret" not in answer.text
        check_shape(path, answer)
