"""A server whose prefix tree outlives it: `opensala serve --prefix-dir`."""

import openai
import pytest

from opensala.contexts import checks
from opensala.server import KeyFile, new_key

from .conftest import DOCUMENT, QUESTION

MESSAGES = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]


def ask(live, key="x", question=QUESTION):
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
    messages = [{"role": "user", "content": f"{DOCUMENT}\n\n{question}"}]
    done = client.chat.completions.create(model="small", messages=messages)
    return done.choices[0].message.content, done.usage


def metric(live, name):
    text = live.service.metrics.text().decode()
    (line,) = [x for x in text.splitlines() if x.startswith(f"opensala_{name} ")]
    return float(line.split()[1])


def test_hits_after_a_restart_are_counted_apart(start, tmp_path):
    live = start(prefixes=tmp_path / "p")
    answer, usage = ask(live)
    assert answer == "48213" and not usage.prompt_tokens_details.cached_tokens
    _, usage = ask(live)
    assert usage.prompt_tokens_details.cached_tokens and "restored_tokens" not in usage.opensala
    live.wait(lambda: metric(live, "kept_prefixes") >= 1)  # kept while the server has nothing to do
    assert metric(live, "kept_prefix_bytes") > 100_000 and metric(live, "restored_prompts_total") == 0
    live.stop()
    live = start(prefixes=tmp_path / "p")
    answer, usage = ask(live)
    restored = usage.opensala["restored_tokens"]
    assert answer == "48213" and restored == usage.prompt_tokens_details.cached_tokens > 400
    assert metric(live, "restored_prompt_tokens_total") == restored
    assert metric(live, "restored_prompts_total") == 1
    assert metric(live, "cached_prompt_tokens_total") == restored
    other = start()
    assert ask(other)[0] == answer and "restored_tokens" not in ask(other)[1].opensala


def test_a_key_finds_only_its_own(start, tmp_path):
    secrets = [new_key(tmp_path / "keys.json", name)[1] for name in ("ada", "ben")]
    keys = KeyFile(tmp_path / "keys.json")
    live = start(keys=keys, prefixes=tmp_path / "p")
    ask(live, secrets[0])
    live.stop()
    live = start(keys=keys, prefixes=tmp_path / "p")
    assert not ask(live, secrets[1])[1].prompt_tokens_details.cached_tokens
    assert ask(live, secrets[0])[1].opensala["restored_tokens"] > 400


def test_damage_is_read_anew(start, tmp_path, caplog):
    live = start(prefixes=tmp_path / "p")
    wanted = ask(live)[0]
    live.stop()
    for path in (tmp_path / "p").glob("segment*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    live = start(prefixes=tmp_path / "p")
    answer, usage = ask(live)
    assert answer == wanted and not usage.prompt_tokens_details.cached_tokens
    assert "a text is read anew" in caplog.text
    with pytest.raises(ValueError, match="in use by process"):
        start(prefixes=tmp_path / "p")


def test_a_disk_that_refuses(start, tmp_path, monkeypatch, caplog):
    live = start(prefixes=tmp_path / "p")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks.os, "fsync", full)
    assert ask(live)[0] == "48213"
    live.wait(lambda: "cannot be written" in caplog.text)
    assert ask(live)[0] == "48213"
    live.stop()
