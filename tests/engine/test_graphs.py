"""Recorded steps: the same bits as in Python, recorded only where that is right, and nothing in them
waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opensala.engine import SamplingParams
from opensala.model.layers import Linear
from opensala.ops import use_backend
from opensala.ops.native import library
from opensala.ops.native.program import NotReplayable, record
from opensala.ops.native.tensors import address

from ..conftest import tiny_model
from . import test_engine
from .test_engine import ids

PARAMS = SamplingParams(max_tokens=25, ignore_eos=True)
PROMPTS = [ids(50), ids(200, 1), ids(5, 2)]


def engine(model=None, **options):
    """Whose steps are recorded where they can be, not run in one call (`test_native_step.py`)."""
    running = test_engine.engine(model, **options)
    running.runner.native.reason = "recorded steps are tested"
    return running


def without_graphs(model, **options):
    running = engine(model, **options)
    running.runner.graphs.reason = "not wanted"
    return running


def outcome(running):
    return [(c.tokens, c.logprobs) for c in running.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "attn_qk_norm": True},
        {"attn_use_rope": True, "lightning_use_rope": False, "tie_word_embeddings": True},
        {"use_output_gate": False, "use_output_norm": False, "attn_use_output_gate": False, "qk_norm": False},
        {"block_search": "hierarchical"},
        {"attention_mode": "dense"},
    ],
    ids=lambda c: ",".join(c) or "released",
)
@pytest.mark.parametrize("speculate", [0, 4])
def test_replayed_steps_are_those_of_python(changes, speculate):
    model = tiny_model(**changes)
    running = engine(model, speculate=speculate)
    assert outcome(running) == outcome(without_graphs(model, speculate=speculate))
    assert running.runner.graphs.reason is None and running.runner.graphs.num_graphs > 1


@pytest.mark.parametrize(
    ("changes", "why"), [({"lightning_nkv": 2}, "repeat"), ({"attn_scale_base": 500}, "log")]
)
def test_what_cannot_be_recorded_runs_in_python(changes, why):
    """Torch computes something in these layers: the step is not replayed, and its tokens are right."""
    model = tiny_model(**changes)
    running = engine(model)
    assert outcome(running) == outcome(without_graphs(model))
    assert "runs within" in running.runner.graphs.reason and running.runner.graphs.num_graphs == 0


def test_changed_weights_are_seen():
    model = tiny_model()
    running = engine(model)
    first = outcome(running)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)  # in place: the recording reads it
    running.scheduler.tree.clear()
    second = outcome(running)
    model.model.layers[0].self_attn.q_proj.weight.data = torch.randn(32, 32)  # somewhere else in memory
    running.scheduler.tree.clear()
    third = outcome(running)
    assert first != second != third and third == outcome(without_graphs(model))


@pytest.mark.parametrize("what", ["parameter", "module"])
def test_parts_that_take_the_place_of_others_are_seen(what):
    """After steps were recorded: what they read is no longer the model's."""
    model = tiny_model()
    running = engine(model)
    first, mlp = outcome(running), model.model.layers[0].mlp
    if what == "module":
        mlp.up_proj = Linear(32, 48, bias=False)
    mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 32))
    running.scheduler.tree.clear()
    assert outcome(running) == outcome(without_graphs(model)) != first


def test_hooks_see_every_step():
    model = tiny_model()
    running, seen = engine(model), []
    outcome(running)
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    running.generate([ids(20)], SamplingParams(max_tokens=10, ignore_eos=True))
    handle.remove()
    assert len(seen) == 10


def test_adapters_are_part_of_the_answer():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model = wrapped.base_model.model
    with_adapter = outcome(engine(model))
    assert "another kind" in engine(model).runner.graphs.reason
    assert with_adapter == outcome(without_graphs(model)) != outcome(engine(tiny_model()))


def test_another_backend_is_not_overruled():
    model = tiny_model()
    running = engine(model)
    outcome(running)
    made = running.runner.graphs.num_graphs
    running.scheduler.tree.clear()
    with use_backend("torch"):
        found = running.generate([ids(20)], PARAMS)[0]
    assert running.runner.graphs.num_graphs == made and found.tokens


def test_a_decoding_step_has_nothing_to_wait_for():
    """In the layers: new memory, other looks at memory, native calls; no operator of torch, so none that
    syncs."""
    model = tiny_model()
    running, counted = engine(model), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in (
                "_local_scalar_dense",
                "nonzero",
                "item",
                "lift_fresh",
                "tolist",
                "masked_select",
            )
            counted.append(name)
            return func(*args, **(kwargs or {}))

    def run_batch(x, batch, *arguments):
        batch.angles(8, model.config)  # before the layers, once for all of them
        with Count(), record() as calls:
            hidden = type(model.model).run_batch(model.model, x, batch, *arguments)
        counted.append(len(calls.numbers))
        return hidden

    running.runner.graphs.reason = "counted"
    for prompt in PROMPTS:
        running.add(prompt, PARAMS)
    while any(s.is_reading for s in running.scheduler.sequences()):
        running.step()
    model.model.run_batch = run_batch
    running.step()
    del model.model.run_batch
    assert counted[-1] > 0 and len(counted) < 80 * len(model.model.layers)


def test_recordings_hold_native_calls_only():
    x, out = torch.rand(3), torch.zeros(3)
    with record() as calls:
        library().call("opensala_add_scaled", address(x), 0, address(x), 0, address(out), 1, 3, 2.0, 1)
    assert torch.equal(out, 3 * x)
    x.fill_(5)
    calls.program().run()
    assert torch.equal(out, torch.full((3,), 15.0))
    for compute in (
        lambda: x + 1,
        lambda: x.add_(1),
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.clone(),
    ):
        with pytest.raises(NotReplayable, match="runs within"), record():
            compute()
    with pytest.raises(NotReplayable, match="has no packed form"), record():
        library().call("opensala_lightning", *[None] * 10, *[0] * 5, 0.0, 1)
