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


def test_kept_layers_budgets_and_machines_on_the_command_line(monkeypatch, capsys, config, tmp_path):
    """What is typed reaches the conversion; what cannot be is refused in one line."""
    seen = {}

    def convert(config, output, **rest):
        seen.update(config=config, **rest)
        return output

    monkeypatch.setattr("opensala.convert.convert", convert)
    start = ["convert", config.teacher, "-o", str(tmp_path / "run"), "--recipe", "smollm2_135m"]
    options = "--keep 0,3,7 --align-tokens 1M --distill-tokens 2.5M --distill-seconds 60 --long-steps 3"
    options += (
        " --micro-tokens 16K --seconds 500 --backend torch --task-share 0.5 --hype-fade 1M --compute float32"
    )
    code, out, _ = run(monkeypatch, capsys, *start, *options.split())
    assert code == 0 and out == ""
    found, execution = seen["config"], seen["execution"]
    assert (found.layers, found.keep, found.hype_fade) == ((0, 3, 7), None, 1_000_000)
    assert (found.align.steps, found.distill.steps, found.long.steps) == (30, 38, 3)
    assert found.distill.seconds == 60 and found.lightning_nkv == 3
    assert found.sparse_config["dense_len"] == 4096 and found.compute == "float32"
    assert found.task_share == 0.5 and all(p.task_share is None for p in found.phases().values())
    assert (execution.micro_tokens, execution.seconds, execution.backend) == (16_000, 500, "torch")
    run(monkeypatch, capsys, *start, "--keep", "5", "--sparse-config", '{"topk": 16}')
    assert (seen["config"].layers, seen["config"].keep) == (None, 5)
    assert seen["config"].sparse_config == {"topk": 16}
    refuse(monkeypatch, capsys, "at least a batch of 64 sequences", *start, "--distill-tokens", "60K")
    refuse(monkeypatch, capsys, "must be a number of tokens as 300000", *start, "--align-tokens", "much")
    refuse(monkeypatch, capsys, "--keep must be numbers as 0,5,11", *start, "--keep", "a,b")
    refuse(monkeypatch, capsys, "drop one of the two", *start, "--keep", "3", "--layers", "0,1")
    tiny = [*start[:-1], "tiny"]
    refuse(monkeypatch, capsys, "this recipe has no such phase", *tiny, "--long-steps", "3")
