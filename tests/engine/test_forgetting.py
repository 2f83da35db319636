"""What an engine forgets: its memory goes back to the system, and nobody else's does."""

import random
import sys

import pytest
import torch

from opensala.engine import Engine, EngineOptions, SamplingParams
from opensala.model import storage as storage_module

from ..conftest import tiny_model

PARAMS = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2)


def ids(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(length)]


def engine(model):
    return Engine(model, None, EngineOptions(max_batch_tokens=50, max_cached_tokens=2000, max_snapshots=8))


def outcome(completion):
    return completion.tokens, completion.logprobs, completion.top


def finish(running):
    found = {}
    while running.has_work:
        found |= {e.request_id: e.completion for e in running.step() if e.completion is not None}
    return found


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_running_requests_keep_what_is_theirs(steps, monkeypatch):
    """While they read and while they answer; what is given back could hold anything afterwards."""
    monkeypatch.setattr(storage_module, "give_back", lambda memory: memory.fill_(float("nan")))
    model, prompts = tiny_model(), [ids(333, 1), ids(100, 2), ids(334, 1)]
    wanted = [outcome(engine(model).generate([prompt], PARAMS)[0]) for prompt in prompts]
    running = engine(model)
    assert outcome(running.generate([prompts[0]], PARAMS)[0]) == wanted[0]
    names = [running.add(prompt, PARAMS) for prompt in prompts]
    for _ in range(steps):
        running.step()
    running.forget_prefixes()
    pages, slots = running.scheduler.pages, running.scheduler.slots
    assert 0 < pages.num_free < pages.size and sum(
        bool(pool.keys[page].isnan().all()) for pool in running.storage.kv.values() for page in pages.free
    ) == pages.num_free * len(running.storage.kv)
    assert all(state[slots.free].isnan().all() for state in running.storage.states.values())
    found = finish(running)
    assert [outcome(found[name]) for name in names] == wanted
    running.check_integrity()
    running.forget_prefixes()
    assert pages.num_free == pages.size and slots.num_free == slots.size
    assert outcome(running.generate([prompts[0]], PARAMS)[0]) == wanted[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes memory back")
def test_what_nobody_holds_is_no_longer_in_memory():
    """It reads as zeros: the system has it."""
    running = engine(tiny_model(head_dim=128, lightning_head_dim=64))
    running.generate([ids(700, 1)], PARAMS)
    kept = [*(tensor for pool in running.storage.kv.values() for tensor in pool)]
    kept += running.storage.states.values()
    assert all(tensor.count_nonzero() for tensor in kept)
    running.forget_prefixes()
    left = sum(int(tensor.count_nonzero()) for tensor in kept)
    assert left < sum(tensor.numel() for tensor in kept) / 100, "beginnings and ends of the system's pages"


def test_no_place_is_no_harm():
    storage = engine(tiny_model()).storage
    before = torch.ones_like(storage.kv[0].keys)
    storage.kv[0].keys[:] = before
    storage.give_back([], [])
    assert torch.equal(storage.kv[0].keys, before)
