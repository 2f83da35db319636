"""Conversions that go on from an earlier outcome."""

import json
from dataclasses import replace

import pytest
import torch

from opensala.convert import convert, sala
from opensala.convert.config import Phase, Probes
from opensala.convert.continuing import continued, take_up
from opensala.convert.distill import Distillation, live_targets
from opensala.convert.lora import add_lora
from opensala.convert.outcome import load_outcome, save_outcome
from opensala.convert.teacher import load_teacher
from opensala.convert.tokens import Sample
from opensala.convert.transfer import assemble, student_config

from .test_lora import PHASE, ids, trained  # noqa: F401 - a fixture
from .test_transfer import make_teacher


@pytest.fixture
def teacher(tmp_path):
    make_teacher(tmp_path / "teacher", "llama")
    return load_teacher(tmp_path / "teacher")


@pytest.fixture
def outcome(teacher, trained, tmp_path):  # noqa: F811
    save_outcome(teacher, trained[0], tmp_path / "outcome")
    return tmp_path / "outcome"


def fresh(teacher, rank=None):
    student = assemble(teacher, student_config(teacher.config, [0, 3], lightning_nkv=2))
    if rank is not None:
        add_lora(student, rank, 7)
    return student


@pytest.mark.parametrize("rank", [None, 3, 5])
def test_a_student_takes_up_what_an_outcome_left(teacher, outcome, rank):
    expected = load_outcome(teacher, outcome)
    student = fresh(teacher, rank)
    take_up(student, outcome)
    with torch.no_grad():
        torch.testing.assert_close(student(ids(2)).logits, expected(ids(2)).logits, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(fresh(teacher)(ids(2)).logits, expected(ids(2)).logits, atol=1e-3)


def test_what_is_trained_on_ends_up_in_the_next_outcome(teacher, outcome, tmp_path):
    student = fresh(teacher)
    distillation = Distillation(
        student,
        "lora",
        live_targets(teacher),
        teacher.lm_head.weight,
        PHASE,
        rank=4,
        seed=1,
        start=str(outcome),
    )
    for step in range(3):
        distillation.gradients(step, Sample(ids(step)))
        distillation.clip()
        distillation.update(PHASE.rate(step))
    save_outcome(teacher, student, tmp_path / "next")
    with torch.no_grad():
        wanted, plain = student(ids(2)).logits, load_outcome(teacher, outcome)(ids(2)).logits
        found = load_outcome(teacher, tmp_path / "next")(ids(2)).logits
    assert (found - wanted).norm() < 0.1 * (wanted - plain).norm()


def test_structure_follows_the_outcome_and_what_would_be_lost_is_refused(teacher, outcome, tmp_path):
    config = replace(sala(str(tmp_path / "teacher")), start=str(outcome), trainable="lora")
    found = continued(config)
    assert found.layers == (0, 3) and found.lightning_nkv == 2 and found.align.steps == 0
    assert found.hype and not found.attn_qk_norm
    assert continued(replace(config, start=None)) == replace(config, start=None)
    for change, message in (
        ({"layers": (0, 1)}, r"keeps layers \[0, 3\], this run \[0, 1\]"),
        ({"trainable": "linear"}, "set trainable to lora or all"),
        ({"lora_rank": 2}, "have rank 3, lora_rank is 2: set it to 3 or more"),
        ({"start": str(tmp_path)}, "holds no outcome.json"),
    ):
        with pytest.raises(ValueError, match=message):
            continued(replace(config, **change))
    with pytest.raises(ValueError, match="start and reuse both"):
        replace(config, reuse="run").check()


def test_an_outcome_of_another_shape_is_refused(teacher, outcome):
    student = assemble(teacher, student_config(teacher.config, [0, 3]))  # k and v for every query head
    with pytest.raises(ValueError, match="start: .* has no place in a hybrid of this teacher"):
        take_up(student, outcome)


def test_a_run_goes_on_from_another_ones_outcome(tmp_path, teacher_folder, text_file):
    torch.set_num_threads(1)
    first = replace(
        sala(str(teacher_folder)),
        layers=(0, 5),
        length=128,
        align=Phase(3, 2, 3e-3, 1e-4),
        distill=Phase(6, 2, 1e-3, 1e-4),
        trainable="lora",
        lora_rank=2,
        probes=Probes(128, 4, 2),
        data=(str(text_file),),
        compute="float32",
        calibrate_tokens=512,
    )
    convert(first, tmp_path / "first", quiet=True)
    start = str(tmp_path / "first" / "outcome")
    second = replace(first, start=start, layers=None, lora_rank=3, distill=Phase(4, 2, 1e-3, 1e-4))
    folder = convert(second, tmp_path / "second", quiet=True).parent
    before, after = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("first", "second"))
    assert set(after) == {"teacher", "before", "distilled"}
    assert after["before"]["nll"] == pytest.approx(before["distilled"]["nll"], abs=0.02)
    assert json.loads((folder / "selection.json").read_text())["kept"] == [0, 5]
    phases = {json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()}
    assert phases == {"distill"}
    assert (folder / "outcome" / "outcome.json").exists()
