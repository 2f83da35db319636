"""`opensala serve` as a program."""

import gc
import json
import signal
import sys
import threading

import openai
import pytest

from opensala.cli import main
from opensala.server import new_key, settle

from ..serving import serving
from .conftest import DOCUMENT, QUESTION

SMALL = ["--max-cached-tokens", "40000", "--grace", "0.5"]


def test_it_serves_and_stops(tmp_path):
    """With a stream under way when Ctrl-C comes: it gets its end, and the process leaves with 0."""
    secret = new_key(tmp_path / "keys.json", "ada")[1]
    ended = []
    with serving([*SMALL, "--keys", str(tmp_path / "keys.json"), "--name", "finder"], signal.SIGINT) as url:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)
        ask = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]
        done = client.chat.completions.create(model="finder", messages=ask)
        assert done.choices[0].message.content == "48213"
        stream = client.completions.create(
            model="finder", prompt="a", max_tokens=30_000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))

        def listen():
            try:
                for _ in stream:
                    pass
            except openai.APIError as error:
                ended.append(error.message)

        listener = threading.Thread(target=listen)
        listener.start()
    listener.join(10)
    assert ended == ["the server is shutting down"]


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["opensala", "serve", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "no API keys"),
        (["--host", "no.such.host.invalid", "--keys", "KEYS"], "cannot be bound"),
        (["--host", ""], "no API keys"),
        (["--port", "65536"], "port must be"),
        (["--port", "x"], "port"),
        (["--keys", "missing.json"], "cannot be read"),
        (["--keys", "EMPTY"], "has no keys"),
        (["--name", " "], "--name is empty"),
        (["--max-running", "0"], "max_running"),
        (["--max-batch-tokens", "0"], "max_batch_tokens"),
        (["--max-cached-tokens", "0"], "max_cached_tokens"),
        (["--max-body-mib", "0"], "max_body_bytes"),
        (["--timeout", "nan"], "request_seconds"),
        (["--grace", "nan"], "grace_seconds"),
        (["--requests-per-minute", "-1"], "requests_per_minute"),
        (["/nowhere"], "no such checkpoint folder"),
        (["--device", "tpu"], "device"),
        (["keys", "new", " ", "--file", "KEYS"], "name is empty"),
        (["keys", "revoke", "eve", "--file", "KEYS"], "no key named 'eve'"),
        (["keys", "list", "--file", "missing.json"], "cannot be read"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    new_key(tmp_path / "KEYS", "ada")
    (tmp_path / "EMPTY").write_text("[]")
    code, out, err = run(monkeypatch, capsys, *words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_a_port_in_use_is_seen_before_the_model_is_loaded(monkeypatch, capsys, live):
    code, _, err = run(monkeypatch, capsys, "--port", str(live.port))
    assert code == 2 and "cannot be bound" in err


def test_keys_from_the_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, secret, _ = run(monkeypatch, capsys, "keys", "new", "ada")
    assert (
        code == 0
        and secret.startswith("sala-")
        and secret.strip() not in (tmp_path / "keys.json").read_text()
    )
    run(monkeypatch, capsys, "keys", "new", "bob")
    run(monkeypatch, capsys, "keys", "revoke", "ada")
    assert run(monkeypatch, capsys, "keys", "list")[1] == "bob\n"
    (listed,) = json.loads(run(monkeypatch, capsys, "keys", "list", "--json")[1])
    assert set(listed) == {"id", "name", "created"}


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(monkeypatch, capsys, "keys", "list")
    assert code == 2 and "pip install 'opensala[serve]'" in err


def test_what_is_loaded_is_left_out_of_garbage_collections():
    settle()
    try:
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()
