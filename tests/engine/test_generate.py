"""The engine: chunked prefill, generation, measurements, and refusals before any work."""

import psutil
import pytest
import torch

from opensala import SALACache
from opensala.engine import Engine, Sampling, memory, prefill
from opensala.engine.probe import answer_all
from opensala.ops.sparse import select

from ..conftest import tiny_model
from ..model.test_equality import tokens


@pytest.fixture(scope="module")
def engine():
    return Engine()


@pytest.mark.parametrize("chunk", [1, 63, 64, 1000])
def test_prefill_does_not_depend_on_the_chunk(chunk):
    model, ids = tiny_model(), tokens(200)
    cache, read = SALACache(model.config), []
    logits = prefill(model, ids, cache, chunk=chunk, progress=read.append)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, -1], atol=2e-5, rtol=1e-4)
    assert sum(read) == 200 and max(read) <= chunk


def test_interrupted_prefill_leaves_whole_chunks():
    model, ids = tiny_model(), tokens(200)
    cache, seen = SALACache(model.config), []

    def stop(count):
        seen.append(count)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prefill(model, ids, cache, chunk=40, progress=stop)
    assert cache.lengths == [120]
    whole = SALACache(model.config)
    expected = prefill(model, ids, whole)
    torch.testing.assert_close(prefill(model, ids[:, 120:], cache), expected, atol=2e-5, rtol=1e-4)


def test_activations_do_not_grow_with_the_prompt(monkeypatch):
    """Largest tensor of a chunked prefill beside the cache: it grows by the scores of one tile of 16 queries
    only."""
    model = tiny_model()
    monkeypatch.setattr(select, "TILE_ELEMENTS", 1)

    def largest(length):
        sizes, cache = [0], SALACache(model.config)

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and not out._is_view() and out.shape[1:] != (2, 8):
                    sizes.append(out.nbytes)
                return out

        with Watch():
            prefill(model, tokens(length), cache, chunk=64)
        return max(sizes)

    windows = 3000 // 4
    assert largest(4000) - largest(1000) <= 16 * 4 * (windows + 8) * 4


def test_engine_equals_plain_generate(engine):
    ids = engine.encode_prompt("The quick brown fox jumps over the lazy dog. The quick brown")
    result = engine.generate(ids, Sampling(max_new_tokens=8), quiet=True)
    plain = engine.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert result.text == engine.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert result.prompt_tokens == ids.shape[1] and 1 <= result.new_tokens <= 8
    assert result.time_to_first_token > 0 and result.cache_bytes > 0 and result.peak_memory_bytes > 1 << 20


def test_engine_continues_a_cache(engine):
    ids = engine.encode_prompt("def add(a, b):\n    return a +")
    cache = SALACache(engine.config)
    engine.generate(ids[:, :6], Sampling(max_new_tokens=1), quiet=True, cache=cache)
    assert cache.columns == 6
    longer = engine.generate(ids[:, 6:], Sampling(max_new_tokens=5), quiet=True, cache=cache)
    assert longer.text == engine.generate(ids, Sampling(max_new_tokens=5), quiet=True).text


def test_sampling_is_reproducible_by_seed(engine):
    ids = engine.encode_prompt("import ")
    texts = [
        engine.generate(ids, Sampling(12, temperature=1.0, top_p=0.9, seed=s), quiet=True).text
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_questions_about_one_document_equal_separate_prompts(engine):
    document = engine.tokenizer(
        "The code of the red door is 4321.\nThe code of the blue door is 8765.\n" * 2
    )["input_ids"]
    questions = [
        engine.tokenizer(
            f"\n\nQuestion: What is the code of the {c} door?\nAnswer:", add_special_tokens=False
        )["input_ids"]
        for c in ("red", "blue")
    ]
    got = answer_all(engine, document, questions, max_new_tokens=8)
    for answer, question in zip(got, questions, strict=True):
        alone = engine.generate(torch.tensor([document + question]), Sampling(8), quiet=True)
        assert answer == alone.text.strip()


def test_a_prompt_that_memory_cannot_hold_is_refused_before_reading(engine, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 300 << 20)
    needed = memory.cache_bytes(engine.config, 3_000_000, torch.float32)
    with pytest.raises(ValueError, match=r"3,000,010 tokens needs [\d,]+ bytes on cpu, [\d,]+ are available"):
        engine.check_prompt(3_000_000, 10)
    assert needed > 300 << 20


def test_available_memory_is_plausible():
    free = memory.available_bytes(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99x"}, "device must be auto, cpu or cuda"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda"),
        ({"dtype": "float8"}, "dtype must be auto, float32, bfloat16, float16, got 'float8'"),
        ({"attention_mode": "spars"}, "attention_mode must be one of"),
        ({"model": "./no/such/folder"}, "no such checkpoint folder"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_gpu_is_said():
    with pytest.raises(ValueError, match="no CUDA GPU is usable here"):
        Engine(device="cuda")


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(0), "max_new_tokens must be at least 1"),
        (Sampling(1, temperature=-1.0), "temperature must be 0 or more"),
        (Sampling(1, temperature=float("nan")), "temperature"),
        (Sampling(1, top_p=0.0), "top_p must be above 0"),
    ],
)
def test_bad_sampling_is_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        sampling.check()
