"""What a context takes, counted from the shapes, against what the engine then has."""

import pytest
import torch

from opensala import MiniCPMSALAConfig
from opensala.engine import Engine, EngineOptions
from opensala.engine.options import kv_dtype_of
from opensala.engine.plan import CARDS, plan_context

from ..conftest import tiny_model

RELEASED = MiniCPMSALAConfig(lightning_nkv=32)


def test_the_released_model():
    """Its published sizes: near 19 GB of weights in bfloat16, 8 KiB a token, 48 MiB of states."""
    plan = plan_context(RELEASED, 1 << 20, torch.bfloat16)
    assert 18e9 < plan.weights < 20e9
    assert plan.keys_values == 8 << 30 and plan.states == 3 * (48 << 20)
    assert 0.95 < plan.compressed / ((256 + 64) << 20) < 1
    assert plan.attended < 0.02 * plan.keys_values
    assert [plan.fits(card * 10**9) for card in CARDS][:3] == ["resident", "all", "all"]
    assert plan_context(RELEASED, 1 << 22, torch.bfloat16).fits(32 * 10**9) == "resident"
    assert plan.fits(10 * 10**9) == "no"
    int8 = plan_context(RELEASED, 1 << 20, torch.bfloat16, torch.int8)
    assert int8.keys_values == plan.keys_values * 132 // 256 and int8.compressed == plan.compressed
    wide = plan_context(RELEASED, 1 << 20, torch.float32, torch.bfloat16)
    assert (wide.keys_values, wide.compressed) == (plan.keys_values, plan.compressed)


@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [1, 16, 63, 200, 4000])
def test_pages_and_slots_are_what_the_engine_makes(tokens, kv_dtype):
    model = tiny_model()
    plan = plan_context(model.config, tokens, torch.float32, kv_dtype_of(kv_dtype))
    options = EngineOptions(max_cached_tokens=max(1, tokens), max_snapshots=0, kv_dtype=kv_dtype)
    engine = Engine(model, None, options)
    pages = -(-tokens // 16)
    held = sum(x[:pages].nbytes for pool in engine.storage.kv.values() for x in (pool.keys, pool.values))
    every = sum(x.nbytes for pool in engine.storage.kv.values() for x in pool)
    assert every == engine.storage.num_pages * engine.sizes.page
    assert plan.keys_values == held and plan.attended <= held
    assert plan.weights == 4 * sum(p.numel() for p in model.parameters())
    assert plan.states == 3 * 4 * sum(x[0].numel() for x in engine.storage.states.values())
    assert plan.resident <= plan.total + plan.attended
    with pytest.raises(ValueError, match="at least one token, got 0"):
        plan_context(model.config, 0, torch.float32)
