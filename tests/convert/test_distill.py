"""The divergence in pieces of the vocabulary equals the plain one; alignment and distillation train what they
should."""

import copy

import pytest
import torch
from torch import nn

from opensala.convert.align import Alignment
from opensala.convert.config import Phase
from opensala.convert.distill import (
    Distillation,
    cache_step,
    cached_targets,
    final_states,
    live_targets,
)
from opensala.convert.kl import chunked_kl
from opensala.convert.probes import replaced
from opensala.convert.teacher import load_teacher
from opensala.convert.tokens import Sample
from opensala.convert.transfer import assemble, lightning_mixers, student_config

from .test_transfer import make_teacher

PHASE = Phase(50, 2, 3e-3, 1e-4, warmup=2)


@pytest.fixture
def teacher(tmp_path):
    make_teacher(tmp_path)
    return load_teacher(tmp_path)


def ids(seed=1, shape=(2, 40)):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [None, 1, 7, 64, 101, 500])
def test_kl_in_pieces_is_the_plain_one(chunk):
    torch.manual_seed(0)
    s, t = torch.randn(23, 12, requires_grad=True), 3 * torch.randn(23, 16)
    ws, wt = torch.randn(101, 12, requires_grad=True), torch.randn(101, 16)
    got = chunked_kl(s, ws, t, wt, chunk)
    plain = nn.functional.kl_div(
        (s @ ws.T).double().log_softmax(-1),
        (t @ wt.T).double().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(got.double(), plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(3 * got, (s, ws)), torch.autograd.grad(3 * plain, (s, ws)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-4)
    assert chunked_kl(s, ws, s, ws, chunk).item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="share a vocabulary, got 101 and 97"):
        chunked_kl(s, ws, t, wt[:97])


def test_kl_survives_large_logits():
    s, w = torch.full((2, 4), 300.0, requires_grad=True), torch.randn(9, 4)
    assert (
        torch.isfinite(chunked_kl(s, w, -s, w, 2))
        and torch.isfinite(torch.autograd.grad(chunked_kl(s, w, -s, w, 2), s)[0]).all()
    )


def test_alignment_error_is_that_of_each_layer_on_its_own(teacher):
    """By hand: the teacher's hidden state of a layer through that layer's mixer, against its attention
    output; what is learnt from is the error relative to that output."""
    alignment = Alignment(teacher, lightning_mixers(teacher), PHASE)
    errors = {name: value.tolist() for name, value in alignment.gradients(ids()).items()}
    seen = {}
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, args, out, n=n: seen.__setitem__(n, (*args, out)))
        for n, layer in enumerate(teacher.model.layers)
    ]
    teacher(ids())
    for hook in hooks:
        hook.remove()
    for n, (x, layout, out) in seen.items():
        mixer = alignment.mixers[n]
        loss = nn.functional.mse_loss(mixer(x, layout), out)
        assert errors["loss"][n] == pytest.approx(loss.item(), rel=1e-5)
        relative = ((mixer(x, layout) - out).square().mean((1, 2)) / out.square().mean((1, 2))).mean()
        assert errors["relative"][n] == pytest.approx(relative.item(), rel=1e-5)
        expected = torch.autograd.grad(relative, list(mixer.parameters()))
        for p, g in zip(mixer.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


def test_alignment_learns_in_every_layer(teacher):
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    alignment = Alignment(teacher, lightning_mixers(teacher), PHASE)
    curve = []
    for step in range(40):
        curve.append(alignment.gradients(ids())["relative"].tolist())
        alignment.clip()
        alignment.update(PHASE.rate(step))
    assert all(last < 0.7 * first for first, last in zip(curve[0], curve[-1], strict=True))
    assert all(torch.equal(before[n], p) for n, p in teacher.named_parameters())


@pytest.mark.parametrize("trainable", ["linear", "all"])
def test_distillation_trains_the_chosen_set(teacher, trainable):
    student = assemble(teacher, student_config(teacher.config, [0, 3]))
    original = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    distillation = Distillation(student, trainable, live_targets(teacher), teacher.lm_head.weight, PHASE)
    losses = []
    for step in range(25):
        losses.append(distillation.gradients(step, Sample(ids())).item())
        distillation.clip()
        distillation.update(PHASE.rate(step))
    changed = {n for n, p in student.named_parameters() if not torch.equal(before[n], p)}
    linear = {n for n in before if ".1.self_attn" in n or ".2.self_attn" in n}
    assert losses[-1] < 0.7 * losses[0]
    assert changed == (linear if trainable == "linear" else set(before))
    assert all(torch.equal(original[n], p) for n, p in teacher.named_parameters())  # nothing is shared
    if trainable == "linear":
        with pytest.raises(ValueError, match="leaves nothing to train"):
            Distillation(
                assemble(teacher, student_config(teacher.config, range(4))),
                "linear",
                live_targets(teacher),
                teacher.lm_head.weight,
                PHASE,
            )


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_the_gradient_of_a_step_is_that_in_float64(teacher, compute, tolerance):
    """With float64 all is done by PyTorch; else by the compiled kernels, with products in `compute`."""
    torch.manual_seed(0)
    student = assemble(teacher, student_config(teacher.config, [0, 2]))
    student.set_attention_mode("dense")
    for p in student.parameters():  # no norm of ones, no part that stands still
        nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.2)
    found = []
    for kind in ("float64", compute):
        dtype = torch.float64 if kind == "float64" else torch.float32
        teaching, learning = (copy.deepcopy(m).to(dtype).train() for m in (teacher, student))
        head = teaching.lm_head.weight
        distillation = Distillation(
            learning, "all", live_targets(teaching), head, PHASE, compute=kind.replace("64", "32")
        )
        loss = distillation.gradients(0, Sample(ids(shape=(3, 70))))
        found.append((loss, {n: p.grad for n, p in learning.named_parameters()}))
    (wanted, exact), (loss, grads) = found
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    largest = max(g.norm() for g in exact.values())
    for name, gradient in grads.items():
        assert (gradient - exact[name]).norm() < tolerance * max(exact[name].norm(), 0.01 * largest), name


def test_cached_targets_are_the_live_ones(teacher, tmp_path):
    cache_step(teacher, tmp_path, 3, ids())
    whole = slice(0, 2)
    assert torch.equal(cached_targets(tmp_path)(3, ids(), whole), live_targets(teacher)(3, ids(), whole))
    assert torch.equal(
        cached_targets(tmp_path)(3, ids()[1:], slice(1, 2)), live_targets(teacher)(3, ids(), whole)[40:]
    )
    logits = final_states(teacher, ids()) @ teacher.lm_head.weight.T
    torch.testing.assert_close(logits.unflatten(0, (2, 40)), teacher(ids()).logits, atol=1e-6, rtol=1e-5)


def test_replacing_a_layer_lasts_as_long_as_the_block(teacher):
    mixers, whole = lightning_mixers(teacher), teacher(ids()).logits
    hybrid = assemble(teacher, student_config(teacher.config, [0, 2, 3], hype=False), {1: mixers[1]})
    with replaced(teacher, {1: mixers[1]}), torch.no_grad():
        changed = teacher(ids()).logits
        torch.testing.assert_close(changed, hybrid(ids()).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, whole) and torch.equal(teacher(ids()).logits, whole)
