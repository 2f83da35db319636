"""The mean of two outcomes."""

import pytest
import torch

from opensala.convert.distill import Distillation, live_targets
from opensala.convert.mean import mean_outcome
from opensala.convert.outcome import load_outcome, save_outcome
from opensala.convert.teacher import load_teacher
from opensala.convert.tokens import Sample

from .test_continuing import fresh
from .test_lora import PHASE, ids
from .test_transfer import make_teacher


@pytest.fixture
def teacher(tmp_path):
    make_teacher(tmp_path / "teacher", "llama")
    return load_teacher(tmp_path / "teacher")


def outcome(teacher, folder, steps, rank, start=None):
    student = fresh(teacher)
    trained = Distillation(
        student, "lora", live_targets(teacher), teacher.lm_head.weight, PHASE, rank=rank, start=start
    )
    for step in range(steps):
        trained.gradients(step, Sample(ids(step)))
        trained.update(3e-3)
    save_outcome(teacher, student, folder)
    return folder


def test_weights_of_a_mean_lie_between(teacher, tmp_path):
    first = outcome(teacher, tmp_path / "first", 6, 2)
    second = outcome(teacher, tmp_path / "second", 6, 3, str(first))
    one, two = (load_outcome(teacher, x).state_dict() for x in (first, second))
    for share in (0.0, 0.25, 1.0):
        kept = mean_outcome(teacher, first, second, tmp_path / f"mean{share}", share=share, rank=5)
        assert kept == pytest.approx(1.0)  # two ranks of one and three of the other
        found = load_outcome(teacher, tmp_path / f"mean{share}").state_dict()
        for name, x in found.items():
            wanted = share * two[name] + (1 - share) * one[name]
            moved = max(float((two[name] - one[name]).norm()), 1e-4)
            assert float((x - wanted).norm()) < 0.1 * moved + 0.01 * float(wanted.norm()), name
    half = mean_outcome(teacher, first, second, tmp_path / "small", rank=1)
    assert 0 < half < 1


def test_what_has_no_mean_is_refused(teacher, tmp_path):
    first = outcome(teacher, tmp_path / "first", 1, 2)
    with pytest.raises(ValueError, match=r"share must be 0 to 1, got 1\.5"):
        mean_outcome(teacher, first, first, tmp_path / "mean", share=1.5)
    bare = fresh(teacher)
    for parameter in bare.parameters():
        parameter.requires_grad_(False)
    bare.model.norm.weight.requires_grad_(True)
    save_outcome(teacher, bare, tmp_path / "bare")
    with pytest.raises(ValueError, match="changed different tensors"):
        mean_outcome(teacher, first, tmp_path / "bare", tmp_path / "mean")
    assert not (tmp_path / "mean").exists() and torch.is_grad_enabled()
