"""Steps in one native call: the bits of the layers run one by one, whatever the model, and run so only where
they can."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from opensala.engine import SamplingParams, native_step
from opensala.model.layers import Linear
from opensala.model.quantised import QuantisedLinear
from opensala.ops import use_backend
from opensala.ops.linear.gptq import Codes

from ..conftest import tiny_model
from .test_engine import BLOCK, DENSE_LEN, WINDOW, engine, ids

PARAMS = SamplingParams(max_tokens=25, ignore_eos=True)
PROMPTS = [ids(50), ids(200, 1), ids(5, 2), ids(DENSE_LEN - 10, 3), ids(WINDOW + 5 * BLOCK - 3, 4)]


def one_by_one(model, **options):
    """An engine that runs every layer in Python."""
    running = engine(model, **options)
    running.runner.native.reason = running.runner.graphs.reason = "not wanted"
    return running


def outcome(running, prompts=PROMPTS, params=PARAMS):
    return [(c.tokens, c.logprobs) for c in running.generate(prompts, params)]


def quantised(linear, bits, group):
    """A layer over codes of the nearest weights."""
    weight, middle = linear.weight.detach(), 1 << bits - 1
    groups = -(-weight.shape[1] // group)
    filled = nn.functional.pad(weight, (0, groups * group - weight.shape[1])).view(len(weight), groups, group)
    scales = (filled.abs().amax(-1) / (middle - 1)).half().float()
    codes = (filled / scales[..., None]).round().flatten(1)[:, : weight.shape[1]].int() + middle
    zeros = torch.full_like(scales, middle - 1).int()
    numbers = Codes(codes.clamp(0, 2 * middle - 1), scales, zeros, torch.arange(weight.shape[1]) // group)
    return QuantisedLinear.of(numbers, linear.bias, bits=bits, group=group)


def quantise(model, bits, group):
    for parent in model.model.layers.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, quantised(child, bits, group))
    return model


def stored(model, dtype):
    """Weights of products in 16 bits."""
    for module in model.model.layers.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.to(dtype)
    return model


MODELS = {
    "released": {},
    "bias": {"attention_bias": True, "attn_qk_norm": True},
    "rotated": {"attn_use_rope": True, "lightning_use_rope": False, "tie_word_embeddings": True},
    "bare": {
        "use_output_gate": False,
        "use_output_norm": False,
        "attn_use_output_gate": False,
        "qk_norm": False,
    },
    "grouped": {"lightning_nkv": 2, "attn_scale_base": 500, "num_key_value_heads": 1},
    "widths": {
        "lightning_head_dim": 10,
        "lightning_nh": 3,
        "lightning_nkv": 3,
        "head_dim": 20,
        "intermediate_size": 75,
    },
    "dense": {"attention_mode": "dense"},
    "sparse": {
        "attention_mode": "sparse",
        "sparse_config": {**tiny_model().config.sparse_config, "lse": "exact"},
    },
    # selection leaves blocks out before a window of the second level is complete (95 tokens)
    "late second level": {
        "attention_mode": "sparse",
        "sparse_config": {
            **tiny_model().config.sparse_config,
            "kernel_size": 24,
            "topk": 3,
            "window_size": 16,
        },
    },
    "scaled rotation": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("speculate", [0, 4])
def test_steps_have_the_bits_of_layers_run_one_by_one(changes, speculate):
    """Five sequences of different lengths and modes, alone and together; drafts are rolled back."""
    model = tiny_model(**changes)
    running = engine(model, speculate=speculate, max_running=5)
    assert outcome(running) == outcome(one_by_one(model, speculate=speculate, max_running=5))
    assert running.runner.native.num_steps > 20 and running.runner.graphs.num_graphs == 0
    running.scheduler.tree.clear()
    alone = [outcome(engine(model, speculate=speculate), [prompt])[0] for prompt in PROMPTS[:3]]
    assert alone == outcome(running, PROMPTS[:3])


def test_long_selections_have_the_same_bits_in_stripes():
    """More blocks than two stripes (STRIPE of step.cpp), the last stripe a part; one token, and drafts."""
    model, prompts = tiny_model(), [ids(2 * 256 * BLOCK + 5 * BLOCK + 3, 7)]
    sizes = {"max_cached_tokens": 12_000, "max_batch_tokens": 2000}
    for speculate in (0, 4):
        running = engine(model, speculate=speculate, **sizes)
        assert outcome(running, prompts) == outcome(one_by_one(model, speculate=speculate, **sizes), prompts)
        assert running.runner.native.num_steps > 0


def test_the_window_before_a_stripe_reaches_into_it():
    """All compressed keys are zero but that of the window that begins in a stripe's last block and ends in
    the next one's first: where a head likes it, it chooses both."""
    model, prompt = tiny_model(), ids(2 * 256 * BLOCK + 5 * BLOCK + 3, 7)
    spec, found = model.config.block_spec, []
    token = (256 * (BLOCK // spec.kernel_stride) - 1) * spec.kernel_stride + spec.kernel_size - 1
    for make in (engine, one_by_one):
        running = make(model, max_cached_tokens=12_000, max_batch_tokens=2000)
        name = running.add(prompt, PARAMS)
        while running.sequence(name).is_reading:
            running.step()
        page, pull = running.sequence(name).pages[token // BLOCK], torch.Generator().manual_seed(0)
        for pool in running.storage.kv.values():
            _, _, k1, k2 = pool
            k1.zero_(), k2.zero_()
            key = k1[page, token % BLOCK // spec.kernel_stride]
            key.copy_(20 * torch.randn(key.shape, generator=pull))
        logprobs = []
        while running.has_work:
            logprobs += [event.logprob for event in running.step() if event.token is not None]
        found.append(logprobs)
    assert found[0] == found[1] and len(found[0]) > 20


@pytest.mark.parametrize(
    "change",
    [
        lambda m: stored(m, torch.bfloat16),
        lambda m: stored(m, torch.float16),
        lambda m: quantise(m, 8, 16),
        lambda m: quantise(m, 4, 16),
    ],
    ids=["bfloat16", "float16", "int8", "int4"],
)
@pytest.mark.parametrize("together", [1, 3, 16])
def test_weights_in_fewer_bits(change, together):
    """A single row, and so many that a block of weights is widened once for all."""
    model = change(tiny_model(attention_bias=True))
    prompts = [ids(30 + 9 * n, n) for n in range(together)]
    running = engine(model, max_running=16)
    assert outcome(running, prompts) == outcome(one_by_one(model, max_running=16), prompts)
    assert running.runner.native.num_steps > 20


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_keys_and_values_in_fewer_bits(kv_dtype, head_dim):
    """Activations are float32, the pages are not: as the layers store them. A head of 64 is turned in pairs
    of bfloat16, of 24 partly, of 8 not at all."""
    model, prompts = tiny_model(attn_scale_base=300, head_dim=head_dim), [ids(190), ids(20, 1)]
    running = engine(model, kv_dtype=kv_dtype)
    assert outcome(running, prompts) == outcome(one_by_one(model, kv_dtype=kv_dtype), prompts)
    assert running.runner.native.num_steps > 20
    assert outcome(engine(model), prompts) != outcome(running, prompts), "the option does something"


def test_a_number_of_threads_changes_no_bit():
    model, before, found = tiny_model(lightning_nkv=2), torch.get_num_threads(), []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        found.append(outcome(engine(model, max_running=5)))
    torch.set_num_threads(before)
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("together", [4, 7, 12])
def test_sequences_that_threads_share_out(threads, together):
    """Equal lengths, so that each thread computes some sequences by itself: as layer by layer, with what is
    kept for drafts, the blocks selected, a scale that grows, and keys and values in 16 bits."""
    length = WINDOW + 5 * BLOCK - 3
    prompts = [ids(length, n)[: length // 2] * 2 for n in range(together)]  # drafts, many of them wrong
    params = SamplingParams(max_tokens=30, ignore_eos=True, selection=30)
    sizes = {"max_running": 12, "max_cached_tokens": 12 * 2 * length, "speculate": 3, "kv_dtype": "bfloat16"}
    model, before, found = tiny_model(attn_scale_base=300, lightning_nkv=2), torch.get_num_threads(), []
    for count, make in ((threads, engine), (1, engine), (1, one_by_one)):
        torch.set_num_threads(count)
        running = make(model, **sizes)
        done = running.generate(prompts, params)
        assert all(c.accepted for c in done[:2]) and any(c.drafted > c.accepted for c in done[-2:])
        blocks = [[{k: v.tolist() for k, v in s.blocks.items()} for s in c.selection] for c in done]
        found.append([(c.tokens, c.logprobs, b) for c, b in zip(done, blocks, strict=True)])
        assert (running.runner.native.num_steps > 5) == (make is engine)
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def advance(running, steps):
    """So many steps; how many of them ran in one call."""
    before = running.runner.native.num_steps
    for _ in range(steps):
        running.step()
    return running.runner.native.num_steps - before


def test_what_changes_in_the_middle_of_an_answer():
    """A hook is seen at once, a module that was replaced after `LOOK_EVERY` steps at the latest, both at once
    when the next request comes."""
    model = tiny_model()
    running = engine(model)
    running.add(ids(20), SamplingParams(max_tokens=1000, ignore_eos=True))
    running.step()
    assert advance(running, 5) == 5
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert advance(running, 3) == 0 and len(seen) == 3
    handle.remove()
    assert advance(running, 5) == 5
    layer = model.model.layers[0].mlp
    layer.up_proj, kept = nn.Sequential(layer.up_proj), layer.up_proj
    assert advance(running, native_step.LOOK_EVERY + 3) <= native_step.LOOK_EVERY
    assert advance(running, 2) == 0
    layer.up_proj = kept
    assert advance(running, 2) == 2
    layer.up_proj = nn.Sequential(kept)
    running.add(ids(3), PARAMS)
    assert advance(running, 2) == 0


def test_changed_weights_are_seen():
    model = tiny_model()
    running = engine(model)
    first = outcome(running)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    running.scheduler.tree.clear()
    second = outcome(running)
    model.model.layers[0].self_attn.q_proj.weight.data = torch.randn(32, 32)
    running.scheduler.tree.clear()
    third = outcome(running)
    model.lm_head.weight = nn.Parameter(torch.randn(97, 32))
    running.scheduler.tree.clear()
    fourth = outcome(running)
    assert len({str(x) for x in (first, second, third, fourth)}) == 4
    assert fourth == outcome(one_by_one(model))


def reasons(caplog):
    return [r.getMessage() for r in caplog.records if "not in one call" in r.getMessage()]


def test_what_needs_the_layers_one_by_one_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(native_step, "_said", set())
    caplog.set_level(logging.INFO, logger="opensala")
    model = tiny_model()
    running, seen = engine(model), []
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    hooked = outcome(running)
    assert len(seen) > 20 and running.runner.native.num_steps == 0
    assert len(reasons(caplog)) == 1 and "a hook must see each call of a module" in reasons(caplog)[0]
    handle.remove()
    running.scheduler.tree.clear()
    assert outcome(running) == hooked and running.runner.native.num_steps > 20
    steps = running.runner.native.num_steps
    running.scheduler.tree.clear()
    with use_backend("torch"):
        outcome(running)
    assert running.runner.native.num_steps == steps and "the backend is torch" in reasons(caplog)[-1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"block_search": "hierarchical"}, "block_search is hierarchical"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
    ],
)
def test_other_models_run_as_before(changes, why, caplog, monkeypatch):
    monkeypatch.setattr(native_step, "_said", set())
    caplog.set_level(logging.INFO, logger="opensala")
    model = tiny_model(**changes)
    running = engine(model)
    assert outcome(running) == outcome(one_by_one(model))
    assert running.runner.native.num_steps == 0 and any(why in text for text in reasons(caplog))


def test_adapters_are_part_of_the_answer():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model = wrapped.base_model.model
    running = engine(model)
    assert "another kind" in running.runner.native.reason
    assert outcome(running) == outcome(one_by_one(model)) != outcome(engine(tiny_model()))


def test_angles_are_those_of_all_positions_at_once():
    from opensala.model.layers import rotary_angles

    angles = native_step._Angles(24, 10000.0, None)
    positions = np.array([0, 255, 256, 1000, 3, 10**6])
    cos, sin = rotary_angles(torch.from_numpy(positions)[None], 24, 10000.0)
    found = angles.at(positions)
    assert np.array_equal(found[0], cos[0].numpy()) and np.array_equal(found[1], sin[0].numpy())
