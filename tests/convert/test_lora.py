"""Low-rank changes of feed-forwards, and a conversion's outcome: what differs from the teacher, in few
bytes."""

import pytest
import torch
from safetensors import safe_open

from opensala.convert.config import Phase
from opensala.convert.distill import Distillation, live_targets
from opensala.convert.lora import LoRALinear, add_lora, lora_parts, merge_lora
from opensala.convert.outcome import _weights, load_outcome, save_outcome
from opensala.convert.teacher import load_teacher
from opensala.convert.tokens import Sample
from opensala.convert.transfer import assemble, student_config
from opensala.convert.widths import dequantise, quantise

from .test_transfer import make_teacher

PHASE = Phase(50, 2, 3e-3, 1e-4, warmup=2)


def ids(seed=1, shape=(2, 40)):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def teacher(tmp_path):
    make_teacher(tmp_path / "teacher", "llama")
    return load_teacher(tmp_path / "teacher")


@pytest.fixture
def trained(teacher):
    """A hybrid some steps into its distillation, and what it computes."""
    student = assemble(teacher, student_config(teacher.config, [0, 3], lightning_nkv=2))
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    distillation = Distillation(
        student, "lora", live_targets(teacher), teacher.lm_head.weight, PHASE, rank=3, seed=5
    )
    for step in range(12):
        distillation.gradients(step, Sample(ids()))
        distillation.clip()
        distillation.update(PHASE.rate(step))
    return student, before


def test_a_wrapped_layer_starts_as_it_was_and_ends_merged():
    g = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(6, 4, bias=False)
    original, x = base.weight.detach().clone(), torch.randn(2, 3, 6, generator=g)
    layer = LoRALinear(base, 2, g)
    assert torch.equal(layer(x), x @ original.T)
    torch.nn.init.normal_(layer.lora_b, generator=g)
    torch.testing.assert_close(layer(x), x @ (original + layer.lora_b @ layer.lora_a).T)
    holder = torch.nn.ModuleDict({"up": layer})
    changed = layer(x).detach()
    merge_lora(holder)
    assert type(holder["up"]) is torch.nn.Linear
    torch.testing.assert_close(holder["up"](x), changed)


def test_lora_trains_attention_norms_and_changes_and_nothing_else(teacher, trained):
    student, before = trained
    frozen = {n for n in before if "mlp" in n or n in ("model.embed_tokens.weight", "lm_head.weight")}
    after = {n.replace(".base.", "."): p for n, p in student.named_parameters() if ".lora_" not in n}
    assert {n for n in before if torch.equal(before[n], after[n])} == frozen
    parts = lora_parts(student)
    assert len(parts) == 12 and all(a.shape[0] == b.shape[1] == 3 for a, b in parts.values())
    assert all(b.any() for _, b in parts.values())
    with torch.no_grad():
        changed = student(ids(2)).logits
    merge_lora(student)
    with torch.no_grad():
        torch.testing.assert_close(student(ids(2)).logits, changed, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(m, LoRALinear) for m in student.modules())
    with pytest.raises(ValueError, match="lora_rank must be 1 to 40"):
        add_lora(student, 41, 0)


def test_the_start_of_low_rank_changes_depends_on_the_seed_alone(teacher):
    starts = []
    for seed in (1, 1, 2):
        student = assemble(teacher, student_config(teacher.config, [0, 3]))
        torch.randn(7)  # the global generator is no part of it
        add_lora(student, 2, seed)
        starts.append(next(iter(lora_parts(student).values()))[0])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("limit,most", [(62.0, 0.02), (0.10, 0.02), (0.085, 0.05)])
def test_the_outcome_and_the_teacher_make_the_hybrid(teacher, trained, tmp_path, limit, most):
    """bfloat16, and in ever more tensors eight bits, as the bytes allow."""
    student, _ = trained
    save_outcome(teacher, student, tmp_path / "outcome", limit_mib=limit, file_mib=0.04)
    files = sorted((tmp_path / "outcome").glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size <= 0.04 * 2**20 for file in files)
    assert sum(file.stat().st_size for file in files) <= limit * 2**20
    with torch.no_grad():
        expected, plain = student(ids(2)).logits, teacher(ids(2)).logits
        again = load_outcome(teacher, tmp_path / "outcome")(ids(2)).logits
    assert (again - expected).norm() < most * (expected - plain).norm()


def test_an_outcome_holds_nothing_that_was_not_trained(teacher, trained, tmp_path):
    save_outcome(teacher, trained[0], tmp_path / "outcome")
    names = set()
    for file in (tmp_path / "outcome").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    assert not {n for n in names if "embed" in n or "lm_head" in n or ("mlp" in n and ".lora_" not in n)}
    assert "model.layers.1.self_attn.z_proj.weight" in names
    assert "model.layers.0.self_attn.o_gate.weight" in names
    assert "model.layers.2.mlp.down_proj.weight.lora_a" in names


def test_eight_bits_are_within_half_a_step():
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 1)[:, None]
    x[2, :64] = 0
    q, scale = quantise(x)
    assert q.dtype == torch.int8 and scale.shape == (5, 2)
    step = scale.float().repeat_interleave(64, 1)
    assert ((dequantise(q, scale) - x).abs() <= 0.5 * step + 0.01 * step).all()
    assert quantise(x[:, :100])[1].shape == (5, 1)


def test_an_error_of_a_factor_counts_as_one_of_the_product():
    a, b, w = (torch.randn(*shape) for shape in ((3, 16), (8, 3), (8, 16)))
    tensors = {"w.lora_a": a, "w.lora_b": b}
    found = _weights(tensors, set(), {"w": w}, {})
    for name, x in tensors.items():
        expected = (b @ a).square().sum() / w.square().sum() / x.square().sum()
        assert found[name] == pytest.approx(float(expected), rel=1e-4)


def test_an_outcome_of_another_teacher_is_refused(trained, teacher, tmp_path):
    save_outcome(teacher, trained[0], tmp_path / "outcome")
    make_teacher(tmp_path / "other", "llama", num_hidden_layers=5)
    with pytest.raises(ValueError, match="no place in a hybrid of this teacher|do not make the hybrid"):
        load_outcome(load_teacher(tmp_path / "other"), tmp_path / "outcome")
    with pytest.raises(ValueError, match="holds no outcome.json"):
        load_outcome(teacher, tmp_path)
