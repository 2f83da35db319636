"""Mixers start near what they are to become: output projections fitted by least squares, whatever the
teacher."""

import pytest
import torch
from torch import nn

from opensala.convert.align import Alignment
from opensala.convert.calibrate import NormalEquations, calibrate
from opensala.convert.config import Phase
from opensala.convert.teacher import load_teacher
from opensala.convert.transfer import lightning_mixers, student_config

from .test_transfer import make_teacher

SMOLLM2 = {  # the shape of SmolLM2-135M, with fewer layers and tokens: neither changes a layer
    "vocab_size": 512,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}


def ids(seed, shape, vocabulary=97):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def relative(teacher, mixers, tokens):
    """Mean over layers of the error on tokens that nothing was fitted to."""
    alignment = Alignment(teacher, mixers, Phase(1, 1, 1e-3, 1e-4))
    return alignment.gradients(tokens)["relative"]


def test_the_solution_is_that_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    f, y = (torch.randn(300, n, generator=generator) for n in (20, 7))
    sums = NormalEquations()
    for part in (slice(0, 100), slice(100, 300)):  # in pieces, as they stream
        sums.add(f[part], y[part])
    expected = torch.linalg.lstsq(f.double(), y.double()).solution.T
    torch.testing.assert_close(sums.ridge(1e-12, torch.zeros(7, 20)), expected, atol=1e-9, rtol=1e-7)
    residual = (f.double() @ expected.T - y).square().sum() / y.double().square().sum()
    assert sums.error(expected) == pytest.approx(residual.item(), rel=1e-9)
    w = torch.randn(7, 20, generator=generator)
    factor = sums.scalar(w)
    around = [sums.error(w * (factor + d)) for d in (-0.01, 0.0, 0.01)]
    torch.testing.assert_close(sums.ridge(1e9, w), w.double(), atol=1e-6, rtol=1e-5)
    assert around[1] == min(around) and sums.error(torch.zeros(7, 20)) == 1.0


def test_a_ridge_survives_fewer_tokens_than_directions():
    f = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    sums = NormalEquations()
    sums.add(f, f[:, :3])
    solved = sums.ridge(1e-4, torch.zeros(3, 20))
    assert torch.isfinite(solved).all() and sums.error(solved) < 0.01


def test_alignment_of_smollm2s_shape_starts_below_its_target(tmp_path):
    """As transferred the error is far above the target's size; solved it is below, on average and unseen."""
    make_teacher(tmp_path, "llama", **SMOLLM2)
    teacher = load_teacher(tmp_path)
    for parameter in teacher.parameters():  # attention that mixes: at this width it would choose one token
        if parameter.dim() == 2:
            parameter.mul_(0.3)
    mixers = lightning_mixers(teacher, 3)
    assert mixers[0].k_proj.weight.shape == (192, 576)
    unseen = ids(9, (4, 256), 512)
    before = relative(teacher, mixers, unseen)
    found = calibrate(teacher, mixers, (ids(n, (8, 256), 512) for n in range(4)), "ridge")
    after = relative(teacher, mixers, unseen)
    assert before.mean() > 5 and after.mean() < 1.0
    assert sum(found.after) / 4 == pytest.approx(after.mean().item(), rel=0.1)
    assert sum(found.before) / 4 == pytest.approx(before.mean().item(), rel=0.1)


def test_a_scalar_is_between_nothing_and_a_matrix(tmp_path):
    make_teacher(tmp_path, "qwen3, tied, bias")
    teacher = load_teacher(tmp_path)
    unseen, errors = ids(9, (8, 60)), {}
    for kind in ("none", "scalar", "ridge"):
        mixers = lightning_mixers(teacher)
        start = [mixer.o_proj.weight.clone() for mixer in mixers]
        calibrate(teacher, mixers, (ids(n, (8, 60)) for n in range(6)), kind)
        errors[kind] = relative(teacher, mixers, unseen).mean().item()
        if kind == "none":
            assert all(torch.equal(a, m.o_proj.weight) for a, m in zip(start, mixers, strict=True))
    assert errors["ridge"] < errors["scalar"] < errors["none"]


def test_no_layer_becomes_worse_on_what_judges(tmp_path):
    """Solved from far too little: what is left of it is what helps elsewhere."""
    make_teacher(tmp_path, "llama")
    teacher = load_teacher(tmp_path)
    mixers = lightning_mixers(teacher)
    good = calibrate(teacher, mixers, (ids(n, (8, 60)) for n in range(8)), "ridge")
    judge = ids(3, (1, 400))  # one sequence: alignment takes the error of each, calibration that of all
    for tokens in (ids(1, (1, 20)), torch.zeros(1, 20, dtype=torch.long)):
        poor = calibrate(teacher, mixers, [tokens, judge], "ridge")
        assert all(after <= before for before, after in zip(*poor, strict=True))
        for a, b in zip(poor.after, relative(teacher, mixers, judge).tolist(), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    assert sum(poor.after) < 1.2 * sum(good.after)


def test_groups_of_heads_give_what_repeated_heads_give(tmp_path):
    """k and v of the teacher's size, shared by groups: the mixers start as the repeated ones do."""
    make_teacher(tmp_path, "llama", num_attention_heads=8, hidden_size=80)
    teacher = load_teacher(tmp_path)
    whole = relative(teacher, lightning_mixers(teacher), ids(1, (2, 40)))
    for nkv in (2, 4):
        torch.testing.assert_close(relative(teacher, lightning_mixers(teacher, nkv), ids(1, (2, 40))), whole)
    for nkv in (1, 3, 16):
        with pytest.raises(ValueError, match=f"lightning_nkv must be .* one of 2, 4, 8, got {nkv}"):
            student_config(teacher.config, (), lightning_nkv=nkv)


def test_every_rate_is_the_one_that_was_given(tmp_path):
    """No factor of muP on the matrices of teachers that were trained without it."""
    make_teacher(tmp_path, "llama")
    alignment = Alignment(load_teacher(tmp_path), nn.ModuleList([nn.Linear(3, 3)]), Phase(9, 1, 1e-3, 1e-4))
    alignment.update(0.25)
    assert [group["lr"] for group in alignment.optimizer.param_groups] == [0.25]
