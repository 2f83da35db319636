"""auto-round-lib's kernel for 4 bits: what it computes, what it does not take, how it is chosen."""

import pytest
import torch

from opensala.engine import Engine, EngineOptions, SamplingParams, load_engine, shipped_model
from opensala.model import auto_round
from opensala.model.auto_round import VARIABLE, AutoRoundLinear, int4_kernel, unfit, use_auto_round
from opensala.model.quantised import QuantisedLinear, quantised_layers
from opensala.ops.linear.gptq import Codes

from ..conftest import tiny_model
from ..engine.test_native_step import quantise

MISSING = auto_round.why_not()
needs_it = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def layer(outer=96, inner=128, group=32, bias=False, low=1, bits=4):
    """A layer of random codes, zero points from `low` on."""
    torch.manual_seed(0)
    groups = inner // group
    codes = Codes(
        torch.randint(0, 1 << bits, (outer, inner), dtype=torch.int32),
        (torch.rand(outer, groups) / 16).half().float(),
        torch.randint(low, 1 << bits, (outer, groups), dtype=torch.int32),
        torch.arange(inner) // group,
    )
    return QuantisedLinear.of(codes, torch.randn(outer) if bias else None, bits=bits, group=group)


@needs_it
@pytest.mark.parametrize("rows", [1, 3, 512])
@pytest.mark.parametrize("group, bias", [(32, False), (64, True), (128, False)])
def test_products(rows, group, bias):
    plain = layer(group=group, bias=bias)
    x = torch.randn(2, rows, 128)
    wanted = x.double() @ plain.weights().double().T + (plain.bias.double() if bias else 0)
    with torch.no_grad():
        found = AutoRoundLinear(plain)(x)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert ((found - wanted).abs().max() / wanted.abs().max()) < 5e-6


@needs_it
def test_a_model_with_it_decodes_layer_by_layer():
    model = quantise(tiny_model(), 4, 16)
    prompt, params = list(range(3, 40)), SamplingParams(max_tokens=12, ignore_eos=True)
    options = EngineOptions(max_cached_tokens=2000, max_running=2)
    wanted = Engine(model, None, options).generate([prompt], params)[0]
    count = len(quantised_layers(model))
    assert use_auto_round(model) == count > 0 and not quantised_layers(model)
    running = Engine(model, None, options)
    found = running.generate([prompt], params)[0]
    assert found.tokens == wanted.tokens
    assert torch.allclose(torch.tensor(found.logprobs), torch.tensor(wanted.logprobs), atol=1e-4)
    assert (
        "AutoRoundLinear" in running.runner.native.reason
        and "AutoRoundLinear" in running.runner.graphs.reason
    )
    assert running.runner.native.num_steps == running.runner.graphs.num_graphs == 0
    with pytest.raises(ValueError, match="own layout and cannot be saved"):
        model.state_dict()
    with pytest.raises(ValueError, match="takes float32 on a CPU, got bfloat16"):
        next(m for m in model.modules() if isinstance(m, AutoRoundLinear))(torch.zeros(1, 16).bfloat16())


def test_what_it_does_not_take():
    assert unfit(layer()) is None
    assert "8 bits" in unfit(layer(bits=8))
    assert "zero point is 0" in unfit(layer(low=0))
    reordered = layer()
    reordered.g_idx = reordered.g_idx.flip(0)
    assert "reordered" in unfit(reordered)
    with pytest.raises(ValueError, match="cannot take this layer: it has 8 bits"):
        AutoRoundLinear(layer(bits=8))


def test_it_is_chosen_by_name(monkeypatch):
    assert int4_kernel() == "native"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="OPENSALA_INT4_KERNEL must be native or auto-round, got 'fast'"):
        load_engine()
    monkeypatch.setenv(VARIABLE, "auto-round")
    monkeypatch.setattr(auto_round, "why_not", lambda: "auto-round-lib is not installed: pip install it")
    with pytest.raises(ValueError, match="OPENSALA_INT4_KERNEL=auto-round: auto-round-lib is not installed"):
        use_auto_round(tiny_model())
    monkeypatch.setattr(auto_round, "why_not", lambda: None)
    with pytest.raises(ValueError, match="no layer of 4 bits that it fits"):
        load_engine(str(shipped_model()))
