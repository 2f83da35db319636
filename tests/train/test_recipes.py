"""Recipes, plans, schedules, parameter groups and the guard: the published numbers, and every refusal."""

import math
from dataclasses import replace

import pytest
import torch

from opensala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.model.flops import all_parameters, forward_flops, matrix_parameters
from opensala.train.guard import StepGuard
from opensala.train.optim import new_adamw, parameter_groups, set_rate
from opensala.train.overrides import bind, override
from opensala.train.plan import plan, scratch
from opensala.train.recipe import Guard, Halo, Optimizer, Source
from opensala.train.recipes import minicpm_sala_9b, recipe_named, tiny
from opensala.train.schedule import Schedule

from ..conftest import tiny_config, tiny_model

PUBLISHED = {  # sequence, tokens, batch, rates: arXiv 2602.11761, Table 1
    "stable": (4096, 314.6e9, 7.8e6, 7.5e-3, 7.5e-3, False),
    "short_decay": (4096, 1006.6e9, 7.8e6, 7.5e-3, 3.75e-4, False),
    "long_decay_32k": (32 * 1024, 102.2e9, 7.8e6, 3e-4, 2e-4, True),
    "long_decay_160k": (160 * 1024, 62.9e9, 9.8e6, 2e-4, 1e-4, True),
    "long_decay_520k": (520 * 1024, 50.6e9, 10.1e6, 1e-4, 3.75e-5, True),
    "sft_64k": (64 * 1024, 204.5e9, 15.7e6, 1e-3, 1e-4, True),
    "sft_140k": (140 * 1024, 213.3e9, 17.8e6, 1e-3, 1e-4, True),
}


def test_the_9b_recipe_has_the_published_numbers():
    recipe = minicpm_sala_9b()
    recipe.check()
    halo, *stages = recipe.stages
    assert (
        isinstance(halo, Halo)
        and halo.config.length == 512
        and halo.config.trainable == "linear"
        and halo.config.keep == 8
    )
    read = sum(phase.steps * phase.batch for phase in (halo.config.align, halo.config.distill)) * 512
    assert read == pytest.approx(1.3e9, rel=0.01)
    assert [s.name for s in stages] == list(PUBLISHED)
    for stage in stages:
        sequence, tokens, batch, first, last, sparse = PUBLISHED[stage.name]
        assert (stage.sequence, stage.tokens, stage.sparse) == (sequence, tokens, sparse)
        assert stage.sequences * sequence == pytest.approx(batch, rel=0.006)
        assert stage.steps * stage.sequences * sequence == pytest.approx(tokens, rel=1e-3)
        warm = stage.schedule.warmup
        assert warm == {"stable": 2000, "sft_64k": 1000, "sft_140k": 1000}.get(stage.name, 0)
        assert stage.schedule.rate(warm, stage.steps) == pytest.approx(first) and stage.schedule.rate(
            stage.steps - 1, stage.steps
        ) == pytest.approx(last)
        assert stage.chat == stage.name.startswith("sft")
    assert len(minicpm_sala_9b().model) == 0  # the released configuration


def test_tiny_is_its_twin():
    whole, small = minicpm_sala_9b(), tiny()
    small.check()
    own = [s for s in small.stages if isinstance(s, Halo) or not s.dense_start]
    assert len(own) == len(whole.stages)
    for a, b in zip(own, whole.stages, strict=True):
        assert type(a) is type(b) and a.name.split("_")[0] == b.name.split("_")[0]
        if not isinstance(a, Halo):
            assert (a.sparse, a.chat, a.schedule.kind, a.fresh_optimizer) == (
                b.sparse,
                b.chat,
                b.schedule.kind,
                b.fresh_optimizer,
            )
    assert MiniCPMSALAConfig(**small.model).num_hidden_layers <= 12


def test_plan_gives_a_quarter_of_training_from_scratch():
    rows, whole = plan(minicpm_sala_9b(), 64, "h200", 0.4), scratch(minicpm_sala_9b(), 64, "h200", 0.4)
    assert sum(r.tokens for r in rows) == pytest.approx(1956e9, rel=1e-3)
    assert sum(r.tokens for r in rows) / whole.tokens == pytest.approx(0.2445, abs=1e-3)
    stable = rows[1]
    assert stable.hours == pytest.approx(stable.flops / (64 * 989e12 * 0.4 * 3600))
    assert all(0 < r.memory < 141e9 for r in rows[1:])
    assert plan(minicpm_sala_9b(), 128, "h200", 0.4)[1].hours == pytest.approx(stable.hours / 2)


def test_flops_count_what_the_model_multiplies():
    """Against counts of torch's own counter on a dense forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from opensala.ops import use_backend

    model = tiny_model(attention_mode="dense")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("torch"):
        model(torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    counted = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = 2 * 64 * matrix_parameters(model.config)
    assert counted["mm"] == linear
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert all_parameters(model.config) == sum(p.numel() for p in model.parameters()) - norms
    config = tiny_config(num_hidden_layers=1, mixer_types=["minicpm4"])
    heads = config.num_attention_heads * config.head_dim
    assert (
        forward_flops(config, 63, False) == 2 * matrix_parameters(config) + 4 * heads * 32
    )  # 1..63 keys, 32 in the mean
    seen = (112 * 113 / 2 + 888 * 112) / 1000  # 7 blocks of 16
    keys = 500 / 4 + 500 / 16
    assert forward_flops(config, 1000, True) == pytest.approx(
        2 * matrix_parameters(config) + 4 * heads * seen + 2 * heads * keys
    )


@pytest.mark.parametrize(
    "setting,message",
    [
        ("stabel.peak=1", "Did you mean 'stable'"),
        ("stable.peek=1", "did you mean 'peak'"),
        ("stable.peak=abc", "stable.peak must be a number, got 'abc'"),
        ("stable.peak=nan", "stable.peak must be a number"),
        ("stable.tokens=1.5", "stable.tokens must be a whole number"),
        ("stable.sparse=yes", "stable.sparse must be true or false"),
        ("stable", "--set takes FIELD=VALUE"),
        ("micro_token=3", "did you mean 'micro_tokens'"),
        ("stable.mixture=3", "there is no field 'mixture' to set"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        override(tiny(), setting)


@pytest.mark.parametrize(
    "setting,message",
    [
        ("stable.peak=-1", "stable.peak: a learning rate must be a number above 0, got -1.0"),
        ("short_decay.last=0", "short_decay.last"),
        ("stable.kind=linar", "Did you mean 'linear'"),
        ("stable.sequence=0", "stable.sequence must be a whole number"),
        ("keep=0", "keep must be at least 1"),
        ("stable.cp=3", "must be a multiple of stable.cp"),
        ("dtype=float61", "Did you mean"),
    ],
)
def test_values_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        override(tiny(), setting).check()


def test_settings_reach_every_depth():
    recipe = override(
        override(override(tiny(), "stable.peak=1e-4"), "halo.config.align.steps=7"), "optimizer.clip=0.5"
    )
    assert (
        recipe.stage("stable").schedule.peak == 1e-4
        and recipe.stage("halo").config.align.steps == 7
        and recipe.optimizer.clip == 0.5
    )
    assert bind(minicpm_sala_9b(), {"web": "a.jsonl"}).stage("stable").mixture[0].path == "a.jsonl"
    fed = bind(minicpm_sala_9b(), {"halo": "texts", "web": "a.jsonl"})
    assert fed.stage("halo").config.data == ("texts",)
    for bad in ("wob", "tiny"):
        with pytest.raises(ValueError, match="a source of --data must be one of"):
            bind(minicpm_sala_9b(), {bad: "x"})
    with pytest.raises(ValueError, match="Did you mean 'tiny'"):
        recipe_named("tinny")
    for arguments, message in (
        ((64, "h20", 0.4), "Did you mean 'h200'"),
        ((64, "h200", 1.2), "mfu must be"),
        ((0, "h200", 0.4), "gpus must be"),
        ((24, "h200", 0.4), "24 processes do not divide into groups of long_decay_520k.cp = 16"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(minicpm_sala_9b(), *arguments)


def test_schedules():
    rates = {
        kind: [Schedule(kind, 1.0, 0.1, warmup=4).rate(n, 24) for n in range(24)]
        for kind in ("constant", "exponential", "linear", "cosine")
    }
    for kind, own in rates.items():
        assert own[:4] == [0.25, 0.5, 0.75, 1.0] and own[4] == 1.0
        assert own[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
        assert all(a >= b for a, b in zip(own[4:], own[5:], strict=False))
    ratios = [b / a for a, b in zip(rates["exponential"][4:], rates["exponential"][5:], strict=False)]
    steps = [a - b for a, b in zip(rates["linear"][4:], rates["linear"][5:], strict=False)]
    assert max(ratios) - min(ratios) < 1e-9 and max(steps) - min(steps) < 1e-9
    assert rates["cosine"][4 + 19 // 2] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 9 / 19))


def test_matrices_inside_layers_learn_slower_by_the_width():
    model = tiny_model(hidden_size=32, dim_model_base=8)
    groups = parameter_groups(model, model.config, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names)
    assert (
        found["model.layers.0.mlp.down_proj.weight"]
        == found["model.layers.1.self_attn.z_proj.weight"]
        == (0.25, 0.1)
    )
    assert found["lm_head.weight"] == (1.0, 0.1) and found["model.embed_tokens.weight"] == found[
        "model.norm.weight"
    ] == (1.0, 0.0)
    optimizer = new_adamw(model, model.config, Optimizer(weight_decay=0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    set_rate(optimizer, 0.01)
    optimizer.step()
    moved = {n: (before[n] - p.detach()).mean().item() for n, p in model.named_parameters()}
    assert moved["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.0025, rel=1e-3) and moved[
        "lm_head.weight"
    ] == pytest.approx(0.01, rel=1e-3)


def test_mup_keeps_the_best_rate_as_the_width_grows():
    """One Adam step at the same rate moves the output of a wide model as much as that of a narrow one."""
    moved = []
    for width in (32, 128):
        model = tiny_model(
            seed=1,
            hidden_size=width,
            dim_model_base=16,
            num_hidden_layers=1,
            mixer_types=["minicpm4"],
            intermediate_size=2 * width,
            attention_mode="dense",
        )
        layer = model.model.layers[0].mlp
        torch.manual_seed(0)
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        x = torch.randn(64, width)
        optimizer = new_adamw(model, model.config, Optimizer(weight_decay=0.0))
        first = layer(x)
        (first * torch.randn_like(first)).sum().backward()
        set_rate(optimizer, 1e-2)
        optimizer.step()
        moved.append(((layer(x) - first).square().mean().sqrt() / first.square().mean().sqrt()).item())
    assert moved[1] == pytest.approx(moved[0], rel=0.5)


def test_the_guard_refuses_spikes_and_what_is_not_finite():
    guard = StepGuard(Guard(spike=3.0, window=8, least=4, patience=2))
    assert (
        guard.check(float("nan"), 1.0) == "loss is nan"
        and guard.check(1.0, float("inf")) == "gradient norm is inf"
        and guard.exhausted
    )
    assert guard.check(50.0, 1.0) == "" and not guard.exhausted
    for _ in range(8):
        assert guard.check(2.0, 1.0) == ""
    assert "loss 6.1 is more than 3 times the median 2" in guard.check(
        6.1, 1.0
    ) and "gradient norm" in guard.check(2.0, 3.1)
    again = StepGuard(guard.policy)
    again.load_state_dict(guard.state_dict())
    assert again.exhausted and again.check(6.1, 1.0) == guard.check(6.1, 1.0) != ""


def test_the_released_configuration_has_nine_billion_parameters():
    config = MiniCPMSALAConfig()
    with torch.device("meta"):
        counted = sum(p.numel() for p in MiniCPMSALAForCausalLM(config).parameters() if p.dim() == 2)
    assert all_parameters(config) == counted and 8.5e9 < counted < 9.5e9


def test_an_unknown_source_kind_is_named(corpus):
    from opensala.train.data.batches import check_source

    check_source(Source("a", 1.0, str(corpus / "text.jsonl")))
    with pytest.raises(ValueError, match=r"source 'web' has no path: give one with --data web=PATH"):
        check_source(minicpm_sala_9b().stage("stable").mixture[0])
    with pytest.raises(ValueError, match="holds no documents"):
        check_source(replace(Source("a", 1.0), path=str(corpus / "absent*.jsonl")))


@pytest.mark.parametrize(
    ("name", "least", "most"), [("smollm2-135m", 2e6, 5e6), ("smollm2_135m_gpu", 2e8, 5e8)]
)
def test_the_smollm2_recipe_has_its_budget(name, least, most):
    recipe = recipe_named(name)
    recipe.check()
    halo, *stages = recipe.stages
    phases = halo.config.phases()
    read = sum(p.steps * p.batch * halo.config.length_of(n) for n, p in phases.items())
    assert least < read + sum(s.steps * s.sequences * s.sequence for s in stages) < most
    assert all(p.seconds is None for p in phases.values())  # tokens decide, not the machine
    assert [s.sequence for s in stages if s.sparse and not s.chat] == [8192, 16384, 32768]
    assert stages[-1].chat and recipe.teacher == "smollm2-135m"
