"""`opensala train` and `opensala train plan` on the command line: every kind of bad input is one line and
exit code 2."""

import json
import signal

import pytest

from opensala.train.pipeline import train
from opensala.train.trainer import Stopped

from ..test_cli import refuse, run
from .conftest import mini


def test_plan_prints_the_published_stages_and_the_quarter(monkeypatch, capsys):
    code, out, err = run(
        monkeypatch, capsys, "train", "plan", "minicpm_sala_9b", "--gpus", "64", "--device", "h200"
    )
    assert code == 0 and err == ""
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert (
        "1,006.6B" in rows["short_decay"]
        and "532,480" in rows["long_decay_520k"]
        and "1,956.0B" in rows["total"]
    )
    assert "24.5% of the tokens" in out
    code, out, _ = run(monkeypatch, capsys, "train", "plan", "tiny", "--gpus", "1")
    assert code == 0 and "from scratch" not in out


def test_bad_names_and_values_are_one_line(monkeypatch, capsys, tmp_path):
    output = ["-o", str(tmp_path / "run")]
    refuse(monkeypatch, capsys, "Did you mean 'tiny'", "train", "tinny", *output)
    refuse(monkeypatch, capsys, "Did you mean 'stable'", "train", "tiny", *output, "--stage", "stabel")
    refuse(
        monkeypatch,
        capsys,
        "stable.peak must be a number, got 'fast'",
        "train",
        "tiny",
        *output,
        "--set",
        "stable.peak=fast",
    )
    refuse(monkeypatch, capsys, "--data takes SOURCE=PATH", "train", "tiny", *output, "--data", "code")
    refuse(monkeypatch, capsys, "starts from a trained Transformer", "train", "minicpm_sala_9b", *output)
    refuse(
        monkeypatch,
        capsys,
        "source 'web' has no path",
        "train",
        "minicpm_sala_9b",
        *output,
        "--init",
        "somewhere",
    )
    refuse(monkeypatch, capsys, "not both", "train", "tiny", *output, "--init", "a", "--teacher", "b")
    refuse(
        monkeypatch,
        capsys,
        "cannot be read",
        "train",
        "tiny",
        *output,
        "--chat-template",
        str(tmp_path / "absent"),
    )
    refuse(
        monkeypatch, capsys, "24 processes do not divide", "train", "plan", "minicpm_sala_9b", "--gpus", "24"
    )
    assert not (tmp_path / "run").exists()


def test_bad_data_is_one_line_and_overwrites_nothing(monkeypatch, capsys, tmp_path, corpus):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    (tmp_path / "empty").mkdir()
    shared = [
        "--set",
        "dense.tokens=512",
        "--set",
        "dense.batch_tokens=256",
        "--set",
        "probe_tokens=0",
        "--data",
        f"prose={corpus / 'text.jsonl'}",
        "--data",
        f"facts={corpus / 'text.jsonl'}",
        "--stage",
        "dense",
        "--device",
        "cpu",
        "--quiet",
    ]
    refuse(
        monkeypatch,
        capsys,
        "holds no documents",
        "train",
        "tiny",
        "-o",
        str(tmp_path / "a"),
        *shared,
        "--data",
        f"code={tmp_path / 'empty'}",
    )
    assert not (tmp_path / "a").exists()
    refuse(
        monkeypatch,
        capsys,
        "bad.jsonl line 2 must have text",
        "train",
        "tiny",
        "-o",
        str(tmp_path / "b"),
        *shared,
        "--data",
        f"code={tmp_path / 'bad.jsonl'}",
    )
    code, out, _ = run(
        monkeypatch,
        capsys,
        "train",
        "tiny",
        "-o",
        str(tmp_path / "c"),
        *shared,
        "--data",
        f"code={tmp_path / 'bad.jsonl'}",
        "--skip-bad-data",
    )
    assert code == 0 and out.strip().endswith("models/dense")
    last = json.loads((tmp_path / "c" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bad_documents"] >= 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refuse(
        monkeypatch,
        capsys,
        "is not empty and holds no training",
        "train",
        "tiny",
        "-o",
        str(tmp_path / "full"),
        *shared,
    )
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_a_signal_ends_with_its_code(monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM after step 3 of stable")

    monkeypatch.setattr("opensala.train.pipeline.train", stop)
    code, out, err = run(monkeypatch, capsys, "train", "tiny", "-o", str(tmp_path / "run"))
    assert (code, out, err) == (143, "", "opensala: stopped by SIGTERM after step 3 of stable\n")


def test_a_chat_template_is_asked_for_before_the_first_step(corpus, tmp_path):
    recipe = mini(corpus, chat_template="")
    with pytest.raises(ValueError, match="no chat template: give one with --chat-template"):
        train(recipe, tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_stages_can_be_listed(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "train", "tiny", "-o", str(tmp_path / "run"), "--plan")
    assert code == 0 and "halo: conversion" in out and "sft_2k: " in out and not (tmp_path / "run").exists()
