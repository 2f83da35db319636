"""Captured decoding steps, with a stand-in for CUDA graphs: the same tokens, from fixed shapes, in memory
that stays where it is; and merged projections, which they run on."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from opensala.engine import SamplingParams
from opensala.engine.capture import CallAgain
from opensala.engine.runner import Runner
from opensala.ops import use_backend

from ..conftest import tiny_model
from ..ops.grid import INTERPRETED
from .test_engine import engine, ids

PARAMS = SamplingParams(max_tokens=25, ignore_eos=True)
PROMPTS = [ids(50), ids(200, 1), ids(5, 2)]
CHANGES = [
    {},
    {"attention_bias": True, "attn_qk_norm": True},
    {"attn_use_rope": True, "lightning_use_rope": False, "tie_word_embeddings": True},
    {"use_output_gate": False, "use_output_norm": False, "attn_use_output_gate": False, "qk_norm": False},
    {"lightning_nkv": 2, "attn_scale_base": 500},
    {"attention_mode": "dense"},
]


def captured(model, **options):
    running = engine(model, **options)
    running.runner = Runner(model, running.storage, CallAgain())
    return running


def outcome(running, prompts=PROMPTS):
    return [(c.tokens, c.logprobs) for c in running.generate(prompts, PARAMS)]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: ",".join(c) or "released")
def test_captured_steps_give_the_same_tokens(changes):
    """Three sequences in a step for four, in both modes, beside prompts that are still being read."""
    wanted = outcome(engine(tiny_model(**changes)))
    running = captured(tiny_model(**changes))
    assert outcome(running) == wanted
    assert running.runner.captured.num_graphs >= 2 and running.runner.captured.reason is None
    running.check_integrity()


def test_an_answer_that_turns_sparse_is_captured_anew():
    """Dense up to 63 tokens, then sparse, and from 112 on with blocks left out, in tables of one width."""
    params = SamplingParams(max_tokens=90, ignore_eos=True)
    (wanted,) = engine(tiny_model()).generate([ids(50)], params)
    running = captured(tiny_model())
    (found,) = running.generate([ids(50)], params)
    assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
    assert {key[:3] for key in running.runner.captured._graphs} == {(1, 64, False), (1, 64, True)}


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter; a GPU has tests of its own")
def test_captured_steps_of_the_triton_kernels():
    """Chunks and padded steps of both modes by the kernels of a GPU, in the interpreter.

    Texts are so short that all blocks are chosen: where scores tie, the kernels choose others.
    """
    pytest.importorskip("triton")
    changes = {"attn_use_rope": True, "attn_qk_norm": True}
    prompts, params = [ids(70), ids(20, 1), ids(61, 2)], SamplingParams(max_tokens=4, ignore_eos=True)
    wanted = engine(tiny_model(**changes)).generate(prompts, params)
    running = captured(tiny_model(**changes))
    with use_backend("triton"):
        found = running.generate(prompts, params)
    assert running.runner.captured.num_graphs
    for a, b in zip(found, wanted, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_sizes_and_widths(monkeypatch):
    """17 sequences are launched as they are; fewer take the next size; tables grow by doubling."""
    monkeypatch.setattr("opensala.engine.capture.LEAST_WIDTH", 4)
    model, prompts = tiny_model(), [ids(20 + n, n) for n in range(17)]
    running = captured(model, max_running=17, max_cached_tokens=4000, max_batch_tokens=1000)
    made = [running.generate(prompts[:n], PARAMS) for n in (17, 9, 3, 1)]
    assert {key[0] for key in running.runner.captured._graphs} == {16, 4, 1}
    assert {key[1] for key in running.runner.captured._graphs} == {4}
    running.scheduler.tree.clear()
    running.generate([ids(60)], PARAMS)  # 4 pages of 16, then 6
    assert {key[:2] for key in running.runner.captured._graphs} >= {(1, 4), (1, 8)}
    plain = engine(tiny_model(), max_running=17, max_cached_tokens=4000)
    for completions in made:
        wanted = plain.generate(prompts[: len(completions)], PARAMS)
        assert [(c.tokens, c.logprobs) for c in completions] == [(c.tokens, c.logprobs) for c in wanted]


def test_padding_touches_nothing_of_anybody():
    """Pages and slots that no sequence of the step holds are as they were, but for the scratch ones."""
    model = tiny_model()
    running = captured(model)
    for prompt in PROMPTS:
        running.add(prompt, PARAMS)
    while any(s.is_reading for s in running.scheduler.sequences()):
        running.step()
    storage = running.storage
    held = {p for s in running.scheduler.sequences() for p in s.pages}
    slots = {s.slot for s in running.scheduler.sequences()}
    page, slot = storage.scratch
    before = copy.deepcopy((storage.kv, storage.states))
    running.step()
    slots |= {s.slot for s in running.scheduler.sequences()}
    held |= {p for s in running.scheduler.sequences() for p in s.pages}
    assert running.runner.captured.num_graphs
    for i, pool in storage.kv.items():
        for now, old in zip(pool, before[0][i], strict=True):
            changed = {n for n in range(len(now)) if not torch.equal(now[n], old[n])}
            assert changed <= held | {page}
    for i, states in storage.states.items():
        changed = {n for n in range(len(states)) if not torch.equal(states[n], before[1][i][n])}
        assert changed <= slots | {slot}
    assert page not in held and slot not in slots


def test_a_capture_that_fails_is_said_once(caplog):
    class Refuses(CallAgain):
        def record(self, work):
            work()
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    wanted = outcome(engine(tiny_model()))
    model = tiny_model()
    running = engine(model)
    running.runner = Runner(model, running.storage, Refuses())
    assert outcome(running) == wanted
    assert [r for r in caplog.messages if "CUDA graphs" in r] == [
        "decoding runs without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_drafts_are_not_captured():
    wanted = outcome(engine(tiny_model(), speculate=4))
    running = captured(tiny_model(), speculate=4)
    assert outcome(running) == wanted


def test_merged_parameters_are_the_same_parameters(tmp_path):
    """Names, shapes, values, the files of a checkpoint and gradients; one memory for both."""
    model, plain = tiny_model(attention_bias=True), tiny_model(attention_bias=True)
    model.model.merge_projections()
    for (name, a), (other, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and a.shape == b.shape and a.is_leaf
    mlp = model.model.layers[0].mlp
    assert (
        mlp.gate_proj.weight.untyped_storage().data_ptr() == mlp.up_proj.weight.untyped_storage().data_ptr()
    )
    for folder, one in (("merged", model), ("plain", plain)):
        one.save_pretrained(tmp_path / folder)
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "plain")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[1])
    batch = torch.tensor([ids(80)])
    for one in (model, plain):
        one.train()(input_ids=batch, labels=batch).loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_changed_weights_are_seen():
    model = tiny_model()
    running = captured(model)
    first = outcome(running)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)  # in place
    running.scheduler.tree.clear()
    second = outcome(running)
    model.model.layers[0].self_attn.q_proj.weight.data = torch.randn(32, 32)  # somewhere else in memory
    model.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.randn(32, 32))
    running.scheduler.tree.clear()
    third = outcome(running)
    assert first != second != third and third == outcome(engine(copy.deepcopy(model)))


def test_a_model_that_was_moved_keeps_no_old_weights():
    model = tiny_model()
    wanted = outcome(engine(model))
    model.model.merge_projections()
    model.model._merged.device = torch.device("cuda")  # as if it had been there
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert outcome(engine(model)) == wanted and model.model._merged is None


def test_hooks_and_adapters_see_every_step(caplog):
    model = tiny_model()
    running, seen = captured(model), []
    outcome(running)
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    running.generate([ids(20)], SamplingParams(max_tokens=10, ignore_eos=True))
    handle.remove()
    assert len(seen) == 10
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    running.scheduler.tree.clear()
    with_adapter = outcome(running)
    assert with_adapter == outcome(engine(wrapped.base_model.model)) != outcome(engine(tiny_model()))
    assert any("was replaced by a" in message for message in caplog.messages)
    again = captured(wrapped.base_model.model)  # made with the adapter in place
    assert outcome(again) == with_adapter
