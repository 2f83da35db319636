"""`opensala check`: what it prints and how it ends."""

import json
import sys

import pytest

from opensala.cli import main
from opensala.engine import shipped_model


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["opensala", "check", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr()


def test_a_checkpoint_that_is_not_served(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, str(shipped_model()))
    assert code == 2 and said.out.startswith("refused: ") and "not served by SGLang" in said.out
    code, said = run(monkeypatch, capsys, str(shipped_model()), "--json")
    found = json.loads(said.out)
    assert code == 2 and found["served"] is False and found["findings"][0]["refused"] is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--for", "vllm"], "must be sglang, got 'vllm'"),
        (["--tp", "0"], "tensor_parallel must be at least 1"),
    ],
)
def test_options_that_cannot_be(monkeypatch, capsys, words, says):
    code, said = run(monkeypatch, capsys, str(shipped_model()), *words)
    assert code == 2 and says in said.err
