"""Whole runs of a few steps: what they leave, what loads it, and that stopping anywhere loses and changes
nothing."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer

import opensala.convert.batches as batches_module
import opensala.convert.run as run_module
import opensala.convert.work as work_module
from opensala.convert import convert, halo, sala, tiny
from opensala.convert.align import Alignment
from opensala.convert.batches import Batches, user_texts
from opensala.convert.benchmarks import task_metric
from opensala.convert.config import RECIPES, Phase, Probes
from opensala.convert.probes import answers_right
from opensala.convert.states import States
from opensala.convert.work import Work
from opensala.data.pack import pack, parse_sources
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


def test_the_plan_is_printed_and_nothing_is_trained(config, tmp_path, capsys):
    convert(config, tmp_path / "run", plan_only=True)
    shown = capsys.readouterr().err
    for word in ("alignment", "sweep", "distillation", "2,048", "in all", "MiB free on cpu"):
        assert word in shown
    assert not (tmp_path / "run" / "states").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("rule", "left"), [("recall", False), ("retrieval", True)])
def test_the_plan_knows_what_is_taken_over(config, finished, tmp_path, capsys, rule, left):
    convert(replace(config, rule=rule, keep=3, reuse=str(finished)), tmp_path / "run", plan_only=True)
    shown = capsys.readouterr().err
    assert "alignment" not in shown and ("sweep" in shown) == left and "distillation" in shown


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


def test_a_teacher_too_shallow_for_a_quarter(config, tmp_path):
    from .test_transfer import make_teacher

    make_teacher(tmp_path / "shallow")
    with pytest.raises(
        ValueError,
        match="a teacher of 4 layers cannot keep 25% and both ends stay: name a number with --keep",
    ):
        convert(replace(config, teacher=str(tmp_path / "shallow")), tmp_path / "run", quiet=True)


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


def test_an_answer_counts_if_all_of_its_value_is_right():
    marks = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    right = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    assert answers_right(right, marks) == [True, False, True]  # the end-of-text after a value does not count


def test_all_of_a_packed_folder_is_trained_on(config, teacher_folder, tmp_path):
    rows = [f"Row {n} of the ledger: {n * 31 % 997} sacks of barley went to the mill." for n in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    made = pack(parse_sources([str(tmp_path / "a.jsonl")]), tokenizer, tmp_path / "packed")
    batches = Batches(tokenizer, replace(config, data=(str(tmp_path / "packed"),), task_share=0.0))
    count = made.tokens["a"] // config.length
    drawn = batches.train("align", 0, count).ids
    assert len({row.numpy().tobytes() for row in drawn}) == count  # an epoch has every row once
    held, size = np.load(tmp_path / "packed" / "held_out" / "a.npy"), config.probes.length
    assert batches.text_probes(1)[0].tolist() in held[: len(held) // size * size].reshape(-1, size).tolist()
    ids, marks = batches.recall_probes(128, 2)
    assert ids.shape == (2, 128) and marks.any()
    folder = convert(replace(config, data=(str(tmp_path / "packed"),)), tmp_path / "run", quiet=True)
    assert (folder / "config.json").exists()


def test_more_text_than_is_read_into_memory_is_not_left_out_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("a line of text\n" * 400)
    with pytest.raises(ValueError, match="more than the 3,000 characters .*convert pack"):
        user_texts([str(tmp_path / "a.txt")])


def test_texts_are_read_as_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert user_texts([str(tmp_path / "*.jsonl")]) == ["first", "second"]
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\nbroken\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 is not JSON"):
        user_texts([str(tmp_path)])
