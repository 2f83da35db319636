"""Whole runs of a few steps: what they leave, what loads it, and that stopping anywhere loses and changes
nothing."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

import opensala.convert.run as run_module
import opensala.convert.work as work_module
from opensala.convert import convert, sala
from opensala.convert.align import Alignment
from opensala.convert.config import Phase, Probes
from opensala.convert.probes import answers_right
from opensala.convert.states import States
from opensala.convert.work import Work
from opensala.runs import FolderLock

from ..runs.test_folder import small_files

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(folder):
    """(phase, step) -> loss, each step once."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [(r["phase"], r["step"]) for r in records]
    assert len(set(keys)) == len(keys)
    return {key: r["loss"] for key, r in zip(keys, records, strict=True)}


def saved(folder, phase):
    """Tensors of a phase's newest state."""
    path = States(folder).last(phase)
    reader = dcp.FileSystemReader(path)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, text_file):
    config = replace(
        sala(str(teacher_folder)),
        length=128,
        align=Phase(8, 2, 3e-3, 1e-4, warmup=2),
        save_every=3,
        distill=Phase(8, 2, 1e-3, 1e-4, warmup=2),
        probes=Probes(128, 4, 2),
        data=(str(text_file),),
        compute="float32",
        calibrate_tokens=1024,
    )
    folder = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    return convert(config, folder, quiet=True).parent


def test_a_run_leaves_everything_behind(finished):
    seen = losses(finished)
    assert set(seen) == {(phase, step) for phase in ("align", "distill") for step in range(8)}
    assert len(seen["align", 0]) == 8 and seen["distill", 7] < seen["distill", 0]
    scores = json.loads((finished / "scores.json").read_text())
    for name in ("recall", "general", "kl", "halo", "rope"):
        assert len(scores[name]) == 8
    for name in ("recall", "nll", "kl", "halo", "rope"):
        assert len(scores["errors"][name]) == 8
    selection = json.loads((finished / "selection.json").read_text())
    assert selection["kept"] == [0, 7] and selection["rule"] == "halo"
    assert set(json.loads((finished / "result.json").read_text())) == {"teacher", "aligned", "distilled"}
    for plot in ("alignment", "importance", "distillation"):
        assert (finished / "plots" / f"{plot}.png").stat().st_size > 5000
    assert not list(finished.rglob("*.partial"))


def test_the_checkpoint_loads_in_a_fresh_process_with_the_same_logits(finished, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert not model.config.attn_use_rope and model.config.attention_mode == "auto"
    ids = torch.arange(60)[None] * 31 % 2000
    with torch.no_grad():
        torch.save(model(ids).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch, opensala; from transformers import AutoModelForCausalLM; "
        "torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
        "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.arange(60)[None] * 31 % "
        "2000).logits\n"
        "sys.exit(not torch.equal(logits, torch.load(sys.argv[2])))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(finished / "model"), str(tmp_path / "logits.pt")],
        check=True,
        timeout=120,
    )


def test_ask_takes_the_checkpoint(finished, tmp_path):
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
            str(finished / "model"),
            "--max-new-tokens",
            "3",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["new_tokens"] <= 3


@pytest.mark.parametrize("phase,step", [("align", 5), ("distill", 6)])
def test_a_run_that_breaks_off_resumes_bit_for_bit(config, finished, tmp_path, monkeypatch, phase, step):
    original = Work.batch

    def broken(self, name, n):
        if (name, n) == (phase, step):
            raise KeyboardInterrupt
        return original(self, name, n)

    monkeypatch.setattr(Work, "batch", broken)
    with pytest.raises(KeyboardInterrupt):
        convert(config, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    torch.manual_seed(123)  # the random state is the run's own
    convert(config, tmp_path / "run", resume=True, quiet=True)
    assert losses(tmp_path / "run") == losses(finished)
    same_weights(tmp_path / "run", finished)


def same_weights(one, other):
    assert (one / "model" / "model.safetensors").read_bytes() == (
        other / "model" / "model.safetensors"
    ).read_bytes()


def test_kill_9_in_mid_run_and_resume(config, finished, tmp_path):
    """A process is killed as soon as a step is saved, in either phase; what follows is as if nothing had
    happened."""
    config = replace(config, save_every=1)
    code = (
        "import sys, torch; from opensala.convert.config import *; from opensala.convert import convert; "
        "torch.set_num_threads(1)\n"
        f"convert({config!r}, sys.argv[1], resume='resume' in sys.argv, quiet=True)"
    )
    for wanted in ("align", "distill"):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                code,
                str(tmp_path / "run"),
                *(["resume"] if wanted == "distill" else []),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 100
        while (
            States(tmp_path / "run").last(wanted) is None
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.003)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 16
    convert(config, tmp_path / "run", resume=True, quiet=True)
    assert losses(tmp_path / "run") == losses(finished)
    same_weights(tmp_path / "run", finished)


def test_a_line_cut_short_by_a_kill_is_dropped(config, finished, tmp_path):
    with pytest.raises(ZeroDivisionError):
        interrupted(config, tmp_path / "run", 6)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"phase": "align", "st')
    convert(config, tmp_path / "run", resume=True, quiet=True)
    assert losses(tmp_path / "run") == losses(finished)


def interrupted(config, folder, steps):
    """A run that ends with an error in step `steps` of the alignment."""
    original = Work.batch
    Work.batch = lambda work, phase, n: 1 / 0 if n == steps else original(work, phase, n)
    try:
        convert(config, folder, quiet=True)
    finally:
        Work.batch = original


def test_a_finished_run_is_left_alone_and_others_are_refused(config, finished, tmp_path):
    before = (finished / "metrics.jsonl").read_bytes()
    assert convert(config, finished, resume=True, quiet=True) == finished / "model"
    assert (finished / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="holds this run already: add --resume"):
        convert(config, finished, quiet=True)
    with pytest.raises(
        ValueError,
        match="another configuration: hype is True there and False here; keep is None there and 3 here",
    ):
        convert(replace(config, keep=3, hype=False), finished, resume=True, quiet=True)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no conversion"):
        convert(config, tmp_path, quiet=True)
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_a_full_disk_at_the_last_step_is_one_line_and_the_run_can_be_resumed(
    config, finished, tmp_path, monkeypatch
):
    mine = replace(config, reuse=str(finished), distill=replace(config.distill, steps=0))
    original = run_module.export

    def export(work, student, kept):
        with small_files(20_000):
            original(work, student, kept)

    monkeypatch.setattr(run_module, "export", export)
    with pytest.raises(
        ValueError, match="run cannot be written: .*File too large.*free some space, then go on with --resume"
    ):
        convert(mine, tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run").glob("model*"))
    monkeypatch.undo()
    convert(mine, tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_second_run_in_a_folder_is_refused_before_it_loads_a_teacher(config, tmp_path, monkeypatch):
    monkeypatch.setattr(work_module, "load_teacher", lambda *_: pytest.fail("the folder is in use"))
    with (
        FolderLock(tmp_path / "run"),
        pytest.raises(ValueError, match="run is in use by process .*: wait for it to end"),
    ):
        convert(config, tmp_path / "run", quiet=True)


def test_refused_options_and_plans_leave_no_run_behind(config, finished, tmp_path):
    for changes, message in (
        ({"reuse": str(tmp_path)}, "reuse: .* holds no aligned run"),
        ({"sparse_config": {"topk": "x"}}, "sparse_config.topk must be a whole number"),
        ({"attn_scale_base": 0.5}, "attn_scale_base must be"),
        ({"reuse": str(finished), "seed": 1}, "aligned with another seed"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(replace(config, **changes), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
    convert(config, tmp_path / "run", plan_only=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="run holds no conversion to resume: check its name"):
        convert(config, tmp_path / "run", resume=True, quiet=True)


def test_other_texts_than_the_run_began_with_are_refused(config, finished, text_file, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text(text_file.read_text())
    mine = replace(config, data=(str(texts),))
    convert(replace(mine, distill=replace(mine.distill, steps=0)), tmp_path / "run", quiet=True)
    texts.write_text(text_file.read_text() + "One more line.")
    with pytest.raises(
        ValueError, match="the texts are not those that .* began with .files were changed since."
    ):
        convert(
            replace(mine, distill=replace(mine.distill, steps=0)), tmp_path / "run", resume=True, quiet=True
        )
    with pytest.raises(ValueError, match="the texts are not those"):
        convert(replace(mine, reuse=str(tmp_path / "run")), tmp_path / "other", quiet=True)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(config, tmp_path, monkeypatch):
    original = Alignment.gradients
    calls = []

    def poisoned(self, ids, share):
        errors = original(self, ids, share)
        calls.append(1)
        return errors if len(calls) < 6 else {**errors, "loss": torch.tensor([0.0] * 7 + [math.nan])}

    monkeypatch.setattr(Alignment, "gradients", poisoned)
    with pytest.raises(
        ValueError, match=r"align step 5: the loss of layer 7 is nan; .*align-0000003, is kept"
    ):
        convert(config, tmp_path / "run", quiet=True)
    assert States(tmp_path / "run").note("align")["step"] == 3
    assert all(torch.isfinite(x).all() for x in saved(tmp_path / "run", "align").values())


def test_a_teacher_in_bfloat16_with_what_is_trained_in_float32(config, tmp_path):
    short = replace(
        config,
        dtype="bfloat16",
        align=replace(config.align, steps=2),
        distill=replace(config.distill, steps=2),
        trainable="all",
    )
    folder = convert(short, tmp_path / "run", quiet=True)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert {x.dtype for x in saved(tmp_path / "run", "distill").values()} == {torch.float32}


def test_variants_take_over_what_they_share(config, finished, tmp_path):
    variant = replace(
        config,
        rule="uniform",
        keep=3,
        hype=False,
        trainable="all",
        cache_teacher=True,
        reuse=str(finished),
        distill=replace(config.distill, steps=3),
    )
    folder = convert(variant, tmp_path / "run", quiet=True).parent
    assert json.loads((folder / "selection.json").read_text())["kept"] == [0, 4, 7]
    mine, theirs = losses(folder), losses(finished)
    assert {k: v for k, v in mine.items() if k[0] == "align"} == {
        k: v for k, v in theirs.items() if k[0] == "align"
    }
    assert len(list((folder / "teacher_states").iterdir())) == 3
    assert json.loads((folder / "model" / "config.json").read_text())["attn_use_rope"]
    with pytest.raises(ValueError, match="aligned with another seed"):
        convert(replace(variant, seed=1), tmp_path / "other", quiet=True)


def test_without_distillation_and_without_kept_layers(config, finished, tmp_path):
    none = replace(config, layers=(), reuse=str(finished), distill=replace(config.distill, steps=0))
    folder = convert(none, tmp_path / "run", quiet=True).parent
    assert set(json.loads((folder / "result.json").read_text())) == {"teacher", "aligned"}
    assert "minicpm4" not in json.loads((folder / "model" / "config.json").read_text())["mixer_types"]


def test_the_kl_rule_sweeps_for_itself(config, finished, tmp_path):
    kl = replace(config, rule="kl", keep=3, reuse=str(finished), distill=replace(config.distill, steps=0))
    folder = convert(kl, tmp_path / "run", quiet=True).parent
    scores = json.loads((folder / "scores.json").read_text())
    middle = {i: scores["kl"][i] for i in range(1, 7)}
    assert json.loads((folder / "selection.json").read_text())["kept"] == [0, min(middle, key=middle.get), 7]


@pytest.mark.parametrize(("rule", "left"), [("recall", False), ("retrieval", True)])
def test_the_plan_knows_what_is_taken_over(config, finished, tmp_path, capsys, rule, left):
    convert(replace(config, rule=rule, keep=3, reuse=str(finished)), tmp_path / "run", plan_only=True)
    shown = capsys.readouterr().err
    assert "alignment" not in shown and ("sweep" in shown) == left and "distillation" in shown


def test_an_answer_counts_if_all_of_its_value_is_right():
    marks = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    right = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    assert answers_right(right, marks) == [True, False, True]  # the end-of-text after a value does not count
