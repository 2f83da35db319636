"""What only a GPU can show of the engine: captured steps compute what launched ones do, and nothing waits."""

from contextlib import contextmanager

import pytest
import torch

from opensala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.engine import Engine, EngineOptions, SamplingParams

from ..conftest import tiny_model
from .test_engine import engine, ids

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
RELEASED = {
    "num_hidden_layers": 4,
    "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"],
    "lightning_nkv": 32,
}
OPTIONS = EngineOptions(max_cached_tokens=200_000, max_snapshots=4)


@contextmanager
def no_waiting():
    """A wait within the block is an error; what torch does to be deterministic may wait, and is off."""
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="module")
def released():
    """Four layers at the released widths, in bf16, with weights that give attention something to prefer."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = MiniCPMSALAForCausalLM._from_config(MiniCPMSALAConfig(**RELEASED), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.05 if "embed" not in name else 0.5)
    return model.eval()


def decoding(model, lengths):
    """An engine whose sequences of these lengths are about to decode, and its next step."""
    running = Engine(model, None, OPTIONS)
    for seed, length in enumerate(lengths):
        running.add(ids(length, seed, high=70_000), SamplingParams(max_tokens=40, ignore_eos=True))
    while any(s.is_reading for s in running.scheduler.sequences()):
        running.step()
    return running


@pytest.mark.parametrize("lengths", [[30_000], [20, 9000, 12_345], [50 * n + 7 for n in range(16)]], ids=len)
def test_a_replayed_step_is_a_launched_one(released, lengths):
    """The first time, when it is captured, and later; then with every kernel launched by itself."""
    running = decoding(released, lengths)
    for place in range(3):
        step = running.scheduler.schedule()
        replayed = running.runner.run(step).clone()
        assert running.runner.captured.num_graphs == 1 and running.runner.captured.reason is None
        running.runner.captured.reason = "compared"
        launched = running.runner.run(step)
        running.runner.captured.reason = None
        running.scheduler.discard(step)
        error = (replayed.float() - launched.float()).norm() / launched.float().norm()
        assert error < 0.05, f"step {place}: {error:.3f}"  # tables of other widths are cut otherwise
        running.step()


def test_merged_projections_are_the_separate_ones(released):
    running = decoding(released, [9000])
    step = running.scheduler.schedule()
    running.runner.captured.reason = "compared"
    merged = running.runner.run(step).clone()
    kept, released.model._merged = released.model._merged, None
    separate = running.runner.run(step)
    released.model._merged = kept
    running.scheduler.discard(step)
    assert (merged.float() - separate.float()).norm() / separate.float().norm() < 0.05


def test_nothing_waits_for_the_gpu(released):
    running = decoding(released, [9000, 100])
    for prompt in ([], ids(12_000, 5, high=70_000)):  # decoding, then beside chunks of a prompt
        if prompt:
            running.add(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        running.step()  # captured, compiled
        step = running.scheduler.schedule()
        with no_waiting():
            hidden = running.runner.run(step)
            running.runner.logits(hidden[-1:])
        running.scheduler.discard(step)


def test_decoding_takes_no_more_memory(released):
    running = decoding(released, [9000, 100])
    running.step()
    running.step()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        running.step()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_tokens_are_those_of_a_cpu():
    """In float32, texts so short that all blocks are chosen: where scores tie, the kernels choose others."""
    params, prompts = SamplingParams(max_tokens=24, ignore_eos=True), [ids(70), ids(20, 1), ids(50, 2)]
    wanted = engine(tiny_model()).generate(prompts, params)
    running = engine(tiny_model().cuda())
    found = running.generate(prompts, params)
    assert running.runner.captured.num_graphs and running.runner.captured.reason is None
    for a, b in zip(found, wanted, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)
