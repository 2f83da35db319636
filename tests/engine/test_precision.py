"""Which dtypes a CPU computes in: chosen by measured times, kept for the machine, and what stays equal."""

import json
import logging

import pytest
import torch

from opensala.engine import Engine, EngineOptions, SamplingParams, generate, load_engine, precision
from opensala.engine.precision import HALF_ROWS, Precision, apply_precision, choose_precision
from opensala.model import MiniCPMSALAForCausalLM, SALACache, attention
from opensala.ops.linear import speed
from opensala.ops.linear.speed import ProductTimes

from ..conftest import two_layer_config

FASTER = ProductTimes(one=2e-5, one_stored=1e-5, many=3e-3, many_half=1e-3)  # as with AVX512-BF16
SLOWER = ProductTimes(one=2e-5, one_stored=1e-5, many=3e-3, many_half=15e-3)  # as with AVX2
SLOW_STORED = ProductTimes(one=1e-5, one_stored=2e-5, many=3e-3, many_half=15e-3)


def small(dtype=torch.bfloat16):
    """A model whose weights are exact in `dtype`, held in float32."""
    torch.manual_seed(1)
    return MiniCPMSALAForCausalLM(two_layer_config()).to(dtype).float().eval()


@pytest.mark.parametrize(
    "own, times, expected",
    [
        (torch.bfloat16, FASTER, Precision(torch.bfloat16, HALF_ROWS)),
        (torch.bfloat16, SLOWER, Precision(torch.bfloat16, None)),
        (torch.float16, SLOWER, Precision(torch.float16, None)),
        (torch.bfloat16, SLOW_STORED, Precision()),
        (torch.float32, FASTER, Precision()),  # never below what the checkpoint has
        (torch.float32, None, Precision()),
    ],
)
def test_choice(own, times, expected):
    assert choose_precision(own, times) == expected


def test_measured_here():
    times = speed.measure_products(48, 80, torch.bfloat16)
    assert all(0 < t < 10 for t in (times.one, times.one_stored, times.many, times.many_half))


def test_kept_for_the_machine(tmp_path, monkeypatch):
    """Measured once, read afterwards; anew for another number of threads, and where the file is damaged."""
    calls = []
    monkeypatch.setenv("OPENSALA_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "measure_products", lambda *args: calls.append(args) or FASTER)
    speed._kept.cache_clear()
    assert speed.kept_times(64, 96, torch.bfloat16) == FASTER
    speed._kept.cache_clear()
    assert speed.kept_times(64, 96, torch.bfloat16) == FASTER and len(calls) == 1
    (file,) = tmp_path.glob("products-*.json")
    monkeypatch.setattr(speed.torch, "get_num_threads", lambda: 77)
    speed.kept_times(64, 96, torch.bfloat16)
    assert len(calls) == 2
    monkeypatch.undo()
    monkeypatch.setenv("OPENSALA_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "measure_products", lambda *args: calls.append(args) or FASTER)
    for damaged in ("", "{", '{"one": 1.0}', json.dumps({**speed.asdict(FASTER), "one": -1.0}), "[1]"):
        file.write_text(damaged)
        speed._kept.cache_clear()
        before = len(calls)
        assert speed.kept_times(64, 96, torch.bfloat16) == FASTER and len(calls) == before + 1
    speed._kept.cache_clear()


@pytest.mark.parametrize("times", [FASTER, SLOWER], ids=["fast", "slow"])
def test_auto_asks_the_machine_and_says_so_once(times, tmp_path, monkeypatch, caplog):
    model = small()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    monkeypatch.setattr(precision, "kept_times", lambda *_: times)
    precision._said.clear()
    with caplog.at_level(logging.WARNING, "opensala"):
        engines = [load_engine(str(tmp_path), device="cpu") for _ in range(2)]
    said = [r.getMessage() for r in caplog.records if "dtype auto" in r.getMessage()]
    assert len(said) == 1 and "2.0x in those of one" in said[0] and ", bfloat16 keys and values (" in said[0]
    assert ("bfloat16 products from" in said[0]) == (times is FASTER)
    for engine in engines:
        head = engine.model.lm_head
        assert engine.dtype == torch.float32 and head.weight.dtype == torch.bfloat16
        assert head.half_rows == (HALF_ROWS if times is FASTER else None)
        assert engine.model.model.norm.weight.dtype == torch.float32
        assert engine.storage.dtype == torch.float32


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    from opensala.engine import shipped_model

    AutoTokenizer.from_pretrained(shipped_model()).save_pretrained(folder)


def hidden_states(model, ids, chunk):
    cache = SALACache(model.config)
    cache.begin_prompt([ids.shape[1]], 0)
    with torch.no_grad():
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(chunk, 1)
        ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_keeps_every_bit(dtype):
    """Weights stored in the 16 bits they are exact in: the logits of float32 storage, bit for bit."""
    ids = torch.randint(3, 80, (1, 300))
    wide, narrow = small(dtype), small(dtype)
    apply_precision(narrow, Precision(dtype))
    assert narrow.lm_head.weight.dtype == dtype and narrow.compute_dtype == torch.float32
    assert torch.equal(hidden_states(wide, ids, 300), hidden_states(narrow, ids, 300))
    assert torch.equal(hidden_states(wide, ids, 300), hidden_states(narrow, ids, 7))


def test_half_products_stay_close_and_few_rows_are_exact():
    ids = torch.randint(3, 80, (1, 300))
    wide, half = small(), small()
    apply_precision(half, Precision(torch.bfloat16, HALF_ROWS))
    assert torch.equal(hidden_states(wide, ids, 100), hidden_states(half, ids, 100)), "below HALF_ROWS"
    exact, rounded = hidden_states(wide, ids, 300), hidden_states(half, ids, 300)
    error = (exact - rounded).norm() / exact.norm()
    assert 1e-4 < error < 2e-2, "bfloat16 has 8 bits: 2^-9 for each rounding, some of them behind one another"


def test_with_gradients_narrow_weights_are_widened():
    ids = torch.randint(3, 80, (1, 20))
    wide, narrow = small(), small()
    apply_precision(narrow, Precision(torch.bfloat16))
    assert torch.allclose(wide(ids).logits, narrow(ids).logits, atol=1e-5)


def test_the_shipped_model_gives_the_bits_of_float32():
    """Its checkpoint is float16: whichever storage the machine is faster with, the text is that of
    float32."""
    auto, wide = load_engine(device="cpu"), load_engine(device="cpu", dtype="float32")
    prompt = auto.encode("The access code for the north gate is 48213. What is the access code")
    params = SamplingParams(max_tokens=8)
    texts = [generate(e, prompt, params, stream=False, quiet=True).text for e in (auto, wide)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_feed_forward_stays_in_16_bits_with_the_same_bits(dtype):
    """From HALF_ROWS on nothing is widened between its products; a listener sees every layer run."""
    model = small(dtype)
    apply_precision(model, Precision(dtype, HALF_ROWS))
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, HALF_ROWS, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert mlp._stays_narrow(x) and not mlp._stays_narrow(x[:, 1:])
        together = mlp(x)
        apart = mlp.down_proj(mlp.activate(mlp.gate_proj(x), mlp.up_proj(x)))
        assert together.dtype == torch.float32 and torch.equal(together, apart)
        heard = []
        mlp.up_proj.register_forward_hook(lambda *_: heard.append("up"))
        assert torch.equal(mlp(x), apart) and heard == ["up"]
    assert not mlp._stays_narrow(x), "gradients are wanted"


@pytest.mark.parametrize("half_rows", [None, HALF_ROWS])
def test_attention_rounds_what_the_products_beside_it_round(half_rows, monkeypatch):
    """Calls of many rows; keys and values in float32 ignore it (tests/ops/test_half_products.py)."""
    asked = []

    def spy(op):
        def call(*arguments, **options):
            asked.append((len(arguments[0]), options["half_products"]))
            return op(*arguments, **options)

        return call

    for name in ("paged_attention", "select_blocks_paged"):
        monkeypatch.setattr(attention, name, spy(getattr(attention, name)))
    model = small().to(torch.bfloat16)
    precision.apply_precision(model, Precision(torch.bfloat16, half_rows))
    prompts = [torch.randint(3, 80, (n,)).tolist() for n in (40, 700)]
    options = EngineOptions(max_cached_tokens=4000, max_batch_tokens=350, kv_dtype="bfloat16")
    for prompt in prompts:
        Engine(model, None, options).generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))
    rows = {half for count, half in asked if count >= HALF_ROWS}
    assert rows == {half_rows is not None} and not any(half for count, half in asked if count < HALF_ROWS)
