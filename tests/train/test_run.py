"""Whole runs of the mini recipe: what they leave, and that stopping anywhere loses and changes nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import opensala.parallel.checkpoint as writing
from opensala.data.pack import Packed, PackSource
from opensala.runs import FolderLock
from opensala.train.conversion import recipe_files
from opensala.train.overrides import override
from opensala.train.pipeline import train
from opensala.train.recipe import Guard, Source
from opensala.train.start import Start
from opensala.train.trainer import StageRun, Stopped

from ..parallel.group import run_group
from .conftest import mini
from .runs import break_at, converted, in_child, killed, together

NAMES = ["dense", "stable", "short_decay", "long_decay_1k", "long_decay_4k", "sft_1k"]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(mini(corpus), folder, device="cpu", quiet=True)
    return folder


def numbers(folder):
    """(stage, step) -> what a repeated run must have again, each step once."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [(r["phase"], r["step"]) for r in records]
    assert len(set(keys)) == len(keys)
    return {
        key: [r[name] for name in ("loss", "grad_norm", "lr", "tokens", "targets", "skipped")]
        for key, r in zip(keys, records, strict=True)
    }


def resumed(recipe, folder, **more):
    return train(recipe, folder, resume=True, device="cpu", quiet=True, **more)


def test_a_run_leaves_everything_behind(reference):
    assert set(numbers(reference)) == {(name, step) for name in NAMES for step in range(4)}
    record = json.loads((reference / "metrics.jsonl").read_text().splitlines()[0])
    assert {"tokens_per_second", "mfu", "peak_memory"} <= set(record) and record["mfu"] > 0
    losses = json.loads((reference / "stages.json").read_text())
    assert list(losses) == NAMES and all(own["after"] < own["before"] for own in losses.values())
    assert [p.name for p in sorted((reference / "checkpoints").iterdir())] == [
        "06-sft_1k-0000002",
        "06-sft_1k-0000004",
    ]
    assert (reference / "plots" / "training.png").stat().st_size > 10_000
    assert not list(reference.rglob("*.partial*"))


def test_the_models_load_and_answer(reference, tmp_path):
    hybrid = AutoModelForCausalLM.from_pretrained(reference / "models" / "stable")
    assert (
        hybrid.config.mixer_types[0] == "minicpm4"
        and hybrid.config.attention_mode == "auto"
        and hybrid.config.dense_len == 64
    )
    last = AutoModelForCausalLM.from_pretrained(reference / "model")
    assert any(not torch.equal(a, b) for a, b in zip(hybrid.parameters(), last.parameters(), strict=True))
    (tmp_path / "note.txt").write_text("Nothing of note happened.\n" * 20)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "opensala",
            "ask",
            str(tmp_path / "note.txt"),
            "-q",
            "What?",
            "--model",
            str(reference / "model"),
            "--max-new-tokens",
            "3",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["new_tokens"] <= 3, done.stderr


class Broken(Exception):
    pass


def test_killed_in_every_stage_it_repeats_bit_for_bit(reference, corpus, tmp_path):
    """kill -9 at the fourth step of each stage, with the third one logged but not saved, and in the middle of
    HALO."""
    folder = tmp_path / "run"
    for name in ("dense", "halo", *NAMES[1:]):
        assert in_child(killed, mini(corpus), folder, name, 3) == -signal.SIGKILL
    train(mini(corpus), folder, resume=True, device="cpu", quiet=True)
    assert numbers(folder) == numbers(reference)
    for file in ("model.safetensors", "config.json"):
        assert (folder / "model" / file).read_bytes() == (reference / "model" / file).read_bytes()
    assert json.loads((folder / "stages.json").read_text()) == json.loads(
        (reference / "stages.json").read_text()
    )


def begun(reference, folder, stage="stable"):
    """A copy of the reference as it was before a stage began."""
    index = NAMES.index(stage)
    shutil.copytree(reference, folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    for name in NAMES[index:]:
        shutil.rmtree(folder / "models" / name)
    kept = [
        line
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["phase"] in NAMES[:index]
    ]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    return folder


def test_sigterm_saves_and_says_how_to_go_on(reference, corpus, tmp_path):
    folder = begun(reference, tmp_path / "run")
    original = break_at("stable", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(
        Stopped,
        match="stopped by SIGTERM after step 3 of stable; saved .*02-stable-0000003: go on with --resume",
    ) as stopped:
        resumed(mini(corpus), folder, only=["stable"])
    StageRun._take = original
    assert stopped.value.signum == signal.SIGTERM
    resumed(mini(corpus), folder, only=["stable"])
    assert all(numbers(folder)["stable", n] == numbers(reference)["stable", n] for n in range(4))


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_full_disk_or_a_crash_while_saving_leaves_the_checkpoint_before(
    reference, corpus, tmp_path, monkeypatch, moment
):
    folder = begun(reference, tmp_path / "run")
    kept, count = writing._finish if moment == "rename" else writing.dcp.save, []

    def fail(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            if moment == "write":
                raise writing.CheckpointException(
                    "", {0: (OSError(errno.ENOSPC, "No space left on device"), [])}
                )
            raise Broken
        return kept(*args, **kwargs)

    monkeypatch.setattr(*((writing, "_finish") if moment == "rename" else (writing.dcp, "save")), fail)
    with pytest.raises(ValueError if moment == "write" else Broken) as error:
        resumed(mini(corpus), folder, only=["stable"])
    assert [p.name for p in (folder / "checkpoints").glob("*[0-9]")] == ["02-stable-0000002"]
    if moment == "write":
        assert (
            "No space left" in str(error.value)
            and "0000002, is kept" in str(error.value)
            and "bytes are free" in str(error.value)
        )
    resumed(mini(corpus), folder, only=["stable"])
    assert all(numbers(folder)["stable", n] == numbers(reference)["stable", n] for n in range(4))
    assert not list((folder / "checkpoints").glob("*.partial"))


def test_bad_steps_are_left_out_logged_and_end_the_run_in_the_end(reference, corpus, tmp_path, monkeypatch):
    folder = begun(reference, tmp_path / "run")
    recipe = mini(corpus, guard=Guard(patience=2))
    original, before = StageRun._take, []

    def spoil(self, batch):
        if self.step in (1, 2):
            weight = self.model.lm_head.weight
            before.append(self.model.model.norm.weight.detach().clone())
            hook = weight.register_hook(lambda grad: grad * float("nan"))
            try:
                return original(self, batch)
            finally:
                hook.remove()
                assert torch.equal(before[-1], self.model.model.norm.weight)
        return original(self, batch)

    monkeypatch.setattr(StageRun, "_take", spoil)
    with pytest.raises(
        ValueError,
        match=r"stable step 2: 2 steps in a row could not be applied, the last because gradient norm is "
        r"nan; the last "
        r"checkpoint is .*0000002",
    ):
        resumed(recipe, folder, only=["stable"])
    assert [numbers(folder)["stable", n][5] for n in range(3)] == [
        "",
        "gradient norm is nan",
        "gradient norm is nan",
    ]


def test_stages_one_by_one(reference, corpus, tmp_path):
    folder = begun(reference, tmp_path / "run")
    with pytest.raises(ValueError, match="stage sft_1k begins where stable ends"):
        resumed(mini(corpus), folder, only=["sft_1k"])
    assert resumed(mini(corpus), folder, only=["stable"]) == folder / "models" / "stable"
    assert numbers(folder)["stable", 3] == numbers(reference)["stable", 3]


def test_another_recipe_is_refused(reference, corpus):
    with pytest.raises(ValueError, match="holds this run already: add --resume"):
        train(mini(corpus), reference, device="cpu", quiet=True)
    with pytest.raises(
        ValueError, match=r"another configuration: stages.stable.schedule.peak is 0.002 there and 0.001 here"
    ):
        resumed(override(mini(corpus), "stable.peak=0.001"), reference)
    recipe = mini(corpus)
    swapped = (*recipe.stages[:3], recipe.stages[4], recipe.stages[3], *recipe.stages[5:])
    with pytest.raises(
        ValueError,
        match="order is 'dense halo stable short_decay .* there and 'dense halo stable long_decay_1k "
        "short_decay",
    ):
        resumed(replace(recipe, stages=swapped), reference)
    assert resumed(replace(mini(corpus), save_every=3), reference) == reference / "model"


def test_a_sequence_that_does_not_fit_is_refused_before_the_first_step(
    reference, corpus, tmp_path, monkeypatch
):
    folder = begun(reference, tmp_path / "run")
    monkeypatch.setattr("opensala.train.memory.available_bytes", lambda device: 1_000_000)
    with pytest.raises(
        ValueError,
        match=r"stable: sequences of 128 tokens need about [\d,]+ bytes on cpu .* and 1,000,000 bytes are "
        r"available",
    ):
        resumed(mini(corpus), folder, only=["stable"])
    assert ("stable", 0) not in numbers(folder)


def test_two_processes_train_as_one_does(reference, corpus, tmp_path):
    """From the converted model on: the same losses; in two of the stages the processes share each
    sequence."""
    init, recipe = reference / "halo" / "model", mini(corpus)
    recipe = replace(
        recipe, stages=tuple(s for s in recipe.stages if s.name in ("stable", "long_decay_4k", "sft_1k"))
    )
    train(recipe, tmp_path / "one", start=Start(init=str(init)), device="cpu", quiet=True)
    run_group(2, together, recipe, tmp_path / "two", init, {"long_decay_4k": 2, "sft_1k": 2})
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 12
    for key in one:
        assert one[key][0] == pytest.approx(two[key][0], rel=1e-4), key
        assert one[key][2:] == two[key][2:]
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


def test_two_processes_convert_as_one_does(reference, corpus, tmp_path):
    run_group(2, converted, mini(corpus), tmp_path / "two", reference / "models" / "dense")
    one, two = (
        [json.loads(line) for line in (run / "halo" / "metrics.jsonl").read_text().splitlines()]
        for run in (reference, tmp_path / "two")
    )
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-8) and a["phase"] == b["phase"]
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


def test_a_model_without_mups_scalings_is_warned_of_its_rates(reference, corpus, tmp_path, caplog):
    """The published rates would be those of its matrices too."""
    source = tmp_path / "init"
    shutil.copytree(reference / "halo" / "model", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dim_model_base": config["hidden_size"]}))
    recipe = mini(corpus)
    recipe = replace(recipe, stages=(recipe.stage("stable"),), probe_tokens=0)
    train(recipe, tmp_path / "run", start=Start(init=str(source)), device="cpu", quiet=True)
    assert "stable: this model has no muP scaling" in caplog.text and "at 0.002 itself" in caplog.text
    caplog.clear()
    low = override(recipe, "stable.peak=5e-4")
    train(
        override(low, "stable.last=1e-4"),
        tmp_path / "low",
        start=Start(init=str(source)),
        device="cpu",
        quiet=True,
    )
    assert "muP" not in caplog.text


def test_what_is_refused_leaves_no_run_behind(reference, corpus, tmp_path):
    folder = tmp_path / "run"
    for start, message in (
        (Start(teacher="/nope"), "^teacher: there is no folder /nope$"),
        (Start(init="/nope"), "^init: there is no folder /nope$"),
    ):
        with pytest.raises(ValueError, match=message):
            train(mini(corpus), folder, start=start, device="cpu", quiet=True)
        assert not folder.exists()
    with pytest.raises(ValueError, match="stage sft_1k begins where dense ends"):
        train(mini(corpus), folder, only=["sft_1k"], device="cpu", quiet=True)
    assert not folder.exists()
    with pytest.raises(ValueError, match="run holds no training to resume"):
        resumed(mini(corpus), folder)
    assert not folder.exists()


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(reference, corpus, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(reference / "models" / "dense", other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": 2000}))
    with pytest.raises(ValueError, match="the tokenizer has 2,048 tokens and the model's vocabulary 2,000"):
        train(mini(corpus), tmp_path / "run", start=Start(teacher=str(other)), device="cpu", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(corpus, tmp_path):
    with FolderLock(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by process"):
        train(mini(corpus), tmp_path / "run", device="cpu", quiet=True)


def test_the_conversion_is_trained_on_its_texts(reference, corpus):
    """As packed tokens, as many as its steps take."""
    made, config = Packed(reference / "halo_texts"), mini(corpus).stage("halo").config
    wanted = config.length * (
        config.align.steps * config.align.batch + config.distill.steps * config.distill.batch
    )
    assert made.tokens == {"page": wanted} and made.held_out["page"] >= config.probes.length
    assert json.loads((reference / "halo" / "config.json").read_text())["data"] == [str(made.folder)]


def test_the_files_of_the_first_stage_reach_the_conversion(corpus):
    """Where it has none of its own: those of the mixture, in their shares; made texts are none."""
    recipe = mini(corpus)
    mixture = (
        Source("web", 0.7, "a.jsonl"),
        Source("code", 0.2, "b"),
        Source("facts", 0.1, "synthetic:facts"),
    )
    stages = tuple(
        replace(s, mixture=mixture) if getattr(s, "name", "") == "stable" else s for s in recipe.stages
    )
    found = recipe_files(replace(recipe, stages=stages))
    assert found == [PackSource("web", "a.jsonl", 0.7), PackSource("code", "b", 0.2)]
