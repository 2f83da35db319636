"""What a conversion says and refuses before any work: its plan, its recipes, options and teachers that do not
fit."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from opensala.convert import convert, halo, sala, tiny
from opensala.convert.benchmarks import task_metric
from opensala.convert.config import RECIPES, Phase, Probes

from .test_transfer import make_teacher


def test_the_plan_is_printed_and_nothing_is_trained(config, tmp_path, capsys):
    convert(config, tmp_path / "run", plan_only=True)
    shown = capsys.readouterr().err
    for word in ("alignment", "sweep", "distillation", "2,048", "in all", "MiB free on cpu"):
        assert word in shown
    assert not (tmp_path / "run" / "states").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_cannot_be_converted_is_refused_before_any_work(config, teacher_folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too little text for anything. " * 12)
    for changes, message in (
        ({"data": (str(short),)}, "one sequence needs 128: give more text"),
        ({"data": (str(tmp_path / "absent"),)}, "absent holds no documents"),
        ({"keep": 1}, "keep must be 2 to 8 .*both ends included, got 1"),
        ({"keep": 9}, "got 9"),
        ({"layers": (0, 8)}, r"layers must be different numbers in 0..7, got \[0, 8\]"),
        ({"rule": "halos"}, "Did you mean 'halo'"),
        ({"trainable": "some"}, "trainable must be one of 'linear', 'lora', 'all'"),
        ({"task_share": 2.0}, "task_share must be 0 to 1, got 2.0"),
        ({"length": 8}, "length must be at least 16, got 8"),
        ({"align": Phase(3, 2, math.nan, 0.0)}, "align.lr must be a number above 0, got nan"),
        ({"device": "tpu0"}, "device must be cpu, cuda or cuda:N, got 'tpu0'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(replace(config, **changes), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_and_a_tokenizer_of_another_model(config, teacher_folder, tmp_path):
    with pytest.raises(ValueError, match="^teacher: there is no folder /nope$"):
        convert(replace(config, teacher="/nope"), tmp_path / "run", quiet=True)
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": 2000}))
    with pytest.raises(ValueError, match="the tokenizer has 2,048 tokens and the model's vocabulary 2,000"):
        convert(replace(config, teacher=str(other)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_teacher_too_shallow_for_a_quarter(config, tmp_path):
    make_teacher(tmp_path / "shallow")
    with pytest.raises(
        ValueError,
        match="a teacher of 4 layers cannot keep 25% and both ends stay: name a number with --keep",
    ):
        convert(replace(config, teacher=str(tmp_path / "shallow")), tmp_path / "run", quiet=True)


def test_tasks_of_lm_eval_need_lm_eval(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(ValueError, match="pip install 'opensala\\[eval\\]'"):
        convert(replace(config, probes=Probes(recall_tasks=("squad",))), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_figure_of_an_lm_eval_task():
    assert (
        task_metric(
            "arc",
            {"alias": "arc", "sample_len": 9, "acc,none": 0.4, "acc_stderr,none": 0.1, "acc_norm,none": 0.5},
        )
        == 0.5
    )
    assert task_metric("fda", {"alias": "fda", "contains,none": 0.3, "contains_stderr,none": "N/A"}) == 0.3
    with pytest.raises(ValueError, match="lm-eval task 'x' reports no number"):
        task_metric("x", {"alias": "x"})


def test_recipes():
    published = sala("t")
    tokens = 512 * (published.align.steps * 32 + published.distill.steps * 96)
    assert tokens == pytest.approx(1.311e9, rel=0.001) and published.fix_ends
    assert (halo("t").trainable, halo("t").fix_ends, halo("t").align.steps) == ("all", False, 20_000)
    assert tiny(halo("t")).trainable == "all" and tiny(sala("t")).align.steps < 1000
    for recipe in RECIPES.values():
        recipe("t").check()
    phase = Phase(100, 1, 1e-3, 1e-5, warmup=10)
    assert (
        phase.rate(0) == pytest.approx(1e-4)
        and phase.rate(10) == pytest.approx(1e-3)
        and phase.rate(100) == pytest.approx(1e-5)
    )
