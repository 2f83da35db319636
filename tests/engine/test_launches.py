"""The engine on a GPU that computes nothing: launches, dtypes, devices and bytes of the released 9B model.

What a million tokens take, and that a decoding step is few launches with one copy to the device and one
from it. That every kernel is compiled ahead of time as the model calls it.
"""

import numpy as np
import pytest
import torch

from opensala import MiniCPMSALAConfig
from opensala.engine import Engine, EngineOptions, SamplingParams
from opensala.engine.memory import activation_bytes
from opensala.model.batch import BatchRow, ForwardBatch
from opensala.model.rows import RowStore
from opensala.model.storage import CacheStorage, cache_sizes

from ..fake_gpu import CUDA, fake_gpu, on_fake_gpu
from ..ops.kernels import triton_modules

MILLION = 1 << 20
RELEASED = {"lightning_nkv": 32}
SHORT = {
    **RELEASED,
    "num_hidden_layers": 4,
    "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"],
}
LEAST = {"max_cached_tokens": 40_000, "max_snapshots": 4}

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:Accessing the data pointer")]
pytest.importorskip("triton")


def chunk(model, storage, works):
    """One step of the model: works of (first page, start, count, sparse) each."""
    ids = np.zeros(sum(work[2] for work in works), np.int32)
    size = model.config.block_spec.block_size
    rows = []
    for n, (first, start, count, sparse) in enumerate(works):
        pages = np.arange(first, first - (start + count) // -size, dtype=np.int32)
        rows.append(BatchRow(pages, start, count, sparse, n, n + 16))
    with torch.inference_mode():
        batch = ForwardBatch.of(storage, rows, CUDA, ids=ids)
        x = model.model.embed_tokens(batch.ids)[None] * model.config.scale_emb
        return model.model.run_batch(x, batch)


@pytest.mark.parametrize("prompt", [100, 20_000])
def test_a_decoding_step_is_few_launches_and_two_copies(prompt):
    """Per layer: 10 launches with Lightning, 13 with sparse attention (17 at most, as kernels go); no tensor
    is made on the host; numbers go up once, tokens come back once."""
    with fake_gpu() as gpu:
        running = Engine(on_fake_gpu(MiniCPMSALAConfig(**SHORT)), None, EngineOptions(**LEAST))
        running.add([5] * prompt, SamplingParams(max_tokens=6, ignore_eos=True))
        while any(s.is_reading for s in running.scheduler.sequences()):
            running.step()
        running.step()  # captured
        assert running.runner.captured.num_graphs == 1
        graph = next(iter(running.runner.captured._graphs.values()))
        gpu.forget()
        running.step()  # replayed
        assert gpu.uploads == 1 and gpu.reads == 1 and gpu.host_tensors == []
        assert len(gpu.launches) < 4 * 18 + 30
        gpu.forget()
        with torch.inference_mode():
            graph._work()
        assert gpu.uploads == gpu.reads == 0 and gpu.host_tensors == []
        counts = gpu.counts
    assert counts["add_norm_kernel"] == 2 * 4 + 1 and counts["silu_mul_kernel"] == 4
    assert counts["linear"] == 4 * 4  # q, k, v and gate; output; gate and up; down
    assert counts["split_heads_kernel"] == counts["slots_kernel"] == 2 and counts["store_kernel"] == 2
    assert counts["norm_gate_kernel"] == 4
    around = counts["embedding"] + 12  # embedding and its scale, rotary angles
    attention = 2 * 6 if prompt > 8192 else 2 * 4
    assert len(gpu.launches) <= 4 * 8 + 2 * 2 + attention + around


@pytest.mark.parametrize("count", [1, 4096])
def test_lightning_gets_bf16_and_keeps_float32_states(count):
    with fake_gpu() as gpu:
        model = on_fake_gpu(MiniCPMSALAConfig(**SHORT))
        storage = CacheStorage(model.config, 600, 40, torch.bfloat16, CUDA)
        for merged in (False, True):
            gpu.forget()
            if merged:
                model.model.merge_projections()
            chunk(model, storage, [(0, 0, count, False)])
            names = {"slots_kernel"} if count == 1 else {"segment_kernel", "output_kernel"}
            found = [kinds for name, kinds in gpu.arguments if name in names]
            assert len(found) == 2 * len(names)
            for kinds in found:
                inputs = {kind for name, kind in kinds.items() if name in ("q", "k", "v", "o")}
                assert inputs == {torch.bfloat16} and kinds["states"] == torch.float32


KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32} | {
    "i32": torch.int32,
    "i64": torch.int64,
}


def compiled_ahead():
    """The tensors, by name and dtype, of each kernel's cases for sm_90."""
    found: dict[str, list[dict[str, torch.dtype]]] = {}
    for module in triton_modules():
        for case in module.compile_cases(90) if hasattr(module, "compile_cases") else ():
            tensors = {n: KINDS[kind[1:]] for n, kind in case.types.items() if kind.startswith("*")}
            found.setdefault(case.kernel.__name__, []).append(tensors)
    return found


def test_kernels_are_compiled_ahead_as_the_model_calls_them():
    """A dtype that no case has is a kernel that nobody looked at: its registers, its spills, its products."""
    cases = compiled_ahead()
    with fake_gpu() as gpu:
        model = on_fake_gpu(MiniCPMSALAConfig(**SHORT))
        storage = CacheStorage(model.config, MILLION // 64 + 1, 40, torch.bfloat16, CUDA)
        for merged in (False, True):
            if merged:
                model.model.merge_projections()
            for works in (*SITUATIONS.values(), [(0, 100, 1, False)]):
                chunk(model, storage, works)
        launched = {(name, tuple(kinds.items())) for name, kinds in gpu.arguments}
    unknown = [f"{name} {dict(kinds)}" for name, kinds in launched if dict(kinds) not in cases.get(name, [])]
    assert not unknown, "\n".join(unknown)
    assert len({name for name, _ in launched}) > 15


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_merging_happens_once(device):
    """As `load_engine` calls it, and then the engine."""
    with fake_gpu() as gpu:
        model = on_fake_gpu(MiniCPMSALAConfig(**SHORT))
        model.model.merge_projections(None if device is None else torch.device(device))
        merged, held = model.model._merged, gpu.allocated
        running = Engine(model, None, EngineOptions(**LEAST))
        assert model.model._merged is merged
        assert model.model.merged_layers(model.model.embed_tokens.weight) is merged
        assert gpu.allocated - held < running.storage.num_bytes + (4 << 20)


SITUATIONS = {
    "a million tokens": [(0, MILLION - 4096, 4096, True)],
    "a short prompt": [(0, 0, 4096, False)],
    "a small chunk": [(0, MILLION - 256, 256, True)],
    "sixteen sequences": [(n * 70, 4000, 256, bool(n % 2)) for n in range(16)],
    "decoding": [(0, MILLION - 1, 1, True)],
}


@pytest.fixture(scope="module")
def nine_billion():
    """Peak bytes of each situation beside weights and cache, and what weights and cache take."""
    config, peaks = MiniCPMSALAConfig(**RELEASED), {}
    with fake_gpu() as gpu:
        gpu.total = 32_000_000_000
        model = on_fake_gpu(config)
        weights = gpu.allocated
        running = Engine(model)
        held = gpu.allocated
        for name, works in SITUATIONS.items():
            chunk(model, running.storage, works)  # what is made once is made
            gpu.forget()
            before = gpu.allocated
            chunk(model, running.storage, works)
            peaks[name] = gpu.peak - before
            assert gpu.allocated == before
        return config, weights, held, running.capacity, peaks


def test_a_million_tokens_fit_32_gigabytes(nine_billion):
    """With the engine's own bounds: 16 sequences at a time, chunks of 4,096 tokens."""
    config, weights, held, capacity, peaks = nine_billion
    assert 18.9e9 < weights < 19.0e9
    assert capacity >= MILLION + 256
    assert held + max(peaks.values()) < 31.5e9


def test_a_million_tokens_take_31_gigabytes():
    """What the work itself takes, when the engine is not given all of a card: eight sequences at a time, one
    of them a million tokens long."""
    options = EngineOptions(max_running=8, max_cached_tokens=MILLION + 4096, max_snapshots=4)
    with fake_gpu() as gpu:
        running = Engine(on_fake_gpu(MiniCPMSALAConfig(**RELEASED)), None, options)
        assert running.capacity >= MILLION + 256
        chunk(running.model, running.storage, SITUATIONS["a million tokens"])
        assert 29e9 < gpu.peak < 31e9


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_estimate_covers_what_a_step_allocates(nine_billion, name):
    config, *_, peaks = nine_billion
    tokens = sum(work[2] for work in SITUATIONS[name])
    assert peaks[name] <= activation_bytes(config, torch.bfloat16, tokens)


def test_the_estimate_is_close_where_it_decides(nine_billion):
    config, *_, peaks = nine_billion
    assert activation_bytes(config, torch.bfloat16, 4096) < 1.3 * peaks["a million tokens"]


def test_growth_behind_an_announced_text_is_bounded():
    """transformers' cache, full at half a million tokens: the next page costs 64K tokens' worth, and one
    layer's pages twice while they are copied."""
    with fake_gpu() as gpu:
        config = MiniCPMSALAConfig(**RELEASED)
        store, devices = RowStore(config), [CUDA] * config.num_hidden_layers
        store.reserve(8192, 2, True, torch.bfloat16, devices)
        store.pages.take(8192)
        page = cache_sizes(config, torch.bfloat16).page
        gpu.forget()
        before = gpu.allocated
        store.reserve(1, 0, False, torch.bfloat16, devices)
        assert gpu.allocated - before == 1024 * page
        assert gpu.peak - before < 1.01 * (1024 + 8192 // 8) * page


def test_nothing_is_reallocated():
    """A text that grows over steps, and a second one: the tensors of the cache stay where they are."""
    with fake_gpu() as gpu:
        running = Engine(on_fake_gpu(MiniCPMSALAConfig(**SHORT)), None, EngineOptions(**LEAST))
        pools = [x for pool in running.storage.kv.values() for x in pool] + list(
            running.storage.states.values()
        )
        running.generate([[5] * 9000], SamplingParams(max_tokens=3, ignore_eos=True))
        held = gpu.allocated
        running.generate([[6] * 9000, [7] * 30], SamplingParams(max_tokens=70, ignore_eos=True))
        now = [x for pool in running.storage.kv.values() for x in pool] + list(
            running.storage.states.values()
        )
        assert all(a is b for a, b in zip(pools, now, strict=True))
        assert gpu.allocated - held < 64 << 20  # a captured step more
