"""`opensala convert` and `opensala convert select` on the command line."""

import json
import subprocess
import sys

import pytest

from ..test_cli import refuse, run


@pytest.fixture
def scores(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(
        json.dumps({"recall": [10, 80, 55, 79, 30, 80, 78, 50], "general": [20, 60, 58, 40, 59, 50, 61, 55]})
    )
    return str(file)


def test_select_prints_the_list_and_nothing_else(scores):
    done = subprocess.run(
        [sys.executable, "-m", "opensala", "convert", "select", scores, "--keep", "4"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 4, 6, 7]\n", "")


@pytest.mark.parametrize(
    "options,kept",
    [
        (["--keep", "3", "--no-fix-ends"], [2, 4, 6]),
        (["--keep", "3", "--fix-ends", "--rule", "recall"], [0, 4, 7]),
        (["--keep", "3", "--rule", "uniform"], [0, 4, 7]),
        (["--keep", "2"], [0, 7]),
    ],
)
def test_select_options(monkeypatch, capsys, scores, options, kept):
    code, out, _ = run(monkeypatch, capsys, "convert", "select", scores, *options)
    assert code == 0 and json.loads(out) == kept


def test_select_refuses_in_one_line(monkeypatch, capsys, scores, tmp_path):
    refuse(monkeypatch, capsys, "keep must be 2 to 8", "convert", "select", scores, "--keep", "1")
    refuse(monkeypatch, capsys, "keep must be 2 to 8", "convert", "select", scores, "--keep", "9")
    refuse(
        monkeypatch,
        capsys,
        "Did you mean 'halo'",
        "convert",
        "select",
        scores,
        "--keep",
        "3",
        "--rule",
        "hallo",
    )
    refuse(
        monkeypatch, capsys, "needs a list 'kl'", "convert", "select", scores, "--keep", "3", "--rule", "kl"
    )
    refuse(
        monkeypatch,
        capsys,
        "cannot be read",
        "convert",
        "select",
        str(tmp_path / "absent.json"),
        "--keep",
        "3",
    )
    bad = tmp_path / "bad.json"
    for text, message in (
        ("[", "is not JSON"),
        ('{"recall": [1, NaN], "general": [1, 2]}', "must be a finite number, got nan"),
        ('{"recall": [1, 2, 3], "general": [1, 2]}', "one number per layer each"),
    ):
        bad.write_text(text)
        refuse(monkeypatch, capsys, message, "convert", "select", str(bad), "--keep", "2")


def test_convert_plans_and_refuses(monkeypatch, capsys, config, tmp_path):
    options = [
        config.teacher,
        "-o",
        str(tmp_path / "run"),
        "--recipe",
        "tiny",
        "--length",
        "128",
        "--probe-length",
        "128",
        "--probe-sequences",
        "2",
        "--data",
        config.data[0],
    ]
    code, out, err = run(
        monkeypatch, capsys, "convert", *options, "--align-batch", "2", "--distill-batch", "2", "--plan"
    )
    assert code == 0 and out == "" and "distillation" in err and "expected time" in err
    assert not (tmp_path / "run").exists()
    refuse(
        monkeypatch,
        capsys,
        "run holds no conversion to resume: check its name",
        "convert",
        *options,
        "--align-batch",
        "2",
        "--distill-batch",
        "2",
        "--resume",
    )
    refuse(monkeypatch, capsys, "Did you mean 'tiny'", "convert", *options[:4], "tinny")
    refuse(monkeypatch, capsys, "--layers must be numbers", "convert", *options, "--layers", "a,b")
    refuse(monkeypatch, capsys, "--sparse-config is not JSON", "convert", *options, "--sparse-config", "{")
    refuse(
        monkeypatch,
        capsys,
        "teacher: there is no folder",
        "convert",
        str(tmp_path / "absent" / "model"),
        "-o",
        str(tmp_path / "other"),
    )
