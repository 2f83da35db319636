"""`opensala convert` and `opensala convert select` on the command line."""

import json
import shutil
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
    numbers = "--align-warmup 3 --align-lr 1e-2 --align-last-lr 1e-3 --align-length 256 --align-batch 7"
    numbers += " --long-warmup 9 --clip 0.5 --calibrate-tokens 4K --lora-rank 2"
    run(monkeypatch, capsys, *start, *numbers.split())
    found = seen["config"]
    phase = found.align
    assert (phase.warmup, phase.lr, phase.last_lr, phase.length, phase.batch) == (3, 1e-2, 1e-3, 256, 7)
    assert (found.long.warmup, found.clip, found.calibrate_tokens, found.lora_rank) == (9, 0.5, 4000, 2)
    run(monkeypatch, capsys, *start, "--keep", "5", "--sparse-config", '{"topk": 16}')
    assert (seen["config"].layers, seen["config"].keep) == (None, 5)
    assert seen["config"].sparse_config == {"topk": 16}
    refuse(monkeypatch, capsys, "at least a batch of 64 sequences", *start, "--distill-tokens", "60K")
    refuse(monkeypatch, capsys, "must be a number of tokens as 300000", *start, "--align-tokens", "much")
    both = ["--align-tokens", "1M", "--align-steps", "3"]
    refuse(monkeypatch, capsys, "--align-tokens and --align-steps both say", *start, *both)
    refuse(monkeypatch, capsys, "--keep must be numbers as 0,5,11", *start, "--keep", "a,b")
    refuse(monkeypatch, capsys, "drop one of the two", *start, "--keep", "3", "--layers", "0,1")
    tiny = [*start[:-1], "tiny"]
    refuse(monkeypatch, capsys, "this recipe has no such phase", *tiny, "--long-steps", "3")


def test_bad_inputs_are_one_line_and_leave_nothing(monkeypatch, capsys, config, tmp_path):
    teacher, good = config.teacher, config.data[0]
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nbroken\n')
    for name, change in (
        ("family", {"model_type": "gpt2"}),
        ("awq", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
    ):
        shutil.copytree(teacher, tmp_path / name)
        record = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(record | change))
    before = sorted(tmp_path.iterdir())
    out = ["-o", str(tmp_path / "out")]
    tiny = [*out, "--recipe", "tiny", "--length", "128"]
    none, bad = str(tmp_path / "none.jsonl"), str(tmp_path / "bad.jsonl")
    for says, arguments in (
        ("none.jsonl holds no documents", [teacher, *tiny, "--data", good, "--data", none]),
        ("bad.jsonl line 2 is not JSON", [teacher, *tiny, "--data", bad]),
        ("must be one of 'llama', 'qwen3', 'minicpm', got 'gpt2'", [str(tmp_path / "family"), *tiny]),
        ("its weights are quantised (awq)", [str(tmp_path / "awq"), *tiny]),
        ("at least a batch of 8 sequences", [teacher, *tiny, "--distill-tokens", "500"]),
        ("none.jsonl holds no documents", ["pack", teacher, good, none, *out, "--quiet"]),
        ("bad.jsonl line 2 is not JSON", ["pack", teacher, good, bad, *out, "--quiet"]),
        ("Input should be greater than or equal to 1", ["pack", teacher, good, *out, "--tokens", "0"]),
        ("got 'gpt2'", ["plan", str(tmp_path / "family")]),
        ("its weights are quantised (awq)", ["plan", str(tmp_path / "awq")]),
    ):
        refuse(monkeypatch, capsys, says, "convert", *arguments)
        assert sorted(tmp_path.iterdir()) == before, arguments
