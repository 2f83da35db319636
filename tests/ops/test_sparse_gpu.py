"""What only a GPU can show of the sparse Triton kernels: the released sizes, 64-bit offsets, CUDA graphs, no
waiting."""

import pytest
import torch

from opensala.ops import BlockSpec, extend_compressed, select_blocks, sparse_attention
from opensala.ops.sparse import num_windows
from tests.ops.grid import HAS_TRITON

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
if HAS_TRITON:
    from opensala.ops.sparse import triton, triton_attend, triton_compress, triton_select, triton_top

DEVICE = "cuda"
HEADS, KV_HEADS, DIM = 32, 2, 128
SPEC = BlockSpec()


def normal(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device=DEVICE)


def draw(tokens, length, dtype=torch.bfloat16, batch=1):
    """q twice as long as usual: some keys weigh much more than others."""
    q = normal(batch, tokens, HEADS, DIM, dtype=dtype) * 2
    return q, *(normal(batch, length, KV_HEADS, DIM, seed=n, dtype=dtype) for n in (1, 2))


def assert_near(got, wanted, tolerance, name=""):
    """The largest difference, relative to the largest element wanted, is below the tolerance."""
    assert got.shape == wanted.shape
    error = ((got.float() - wanted).abs().max() / wanted.abs().max()).item()
    assert error < tolerance, f"{name}: {error:.2e} is not below {tolerance:.0e}"


def gradients(q, k, v, blocks, weights, backend, **options):
    """Output and gradients of q, k, v for the loss sum(weights * output of the last queries)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = sparse_attention(*leaves, blocks, SPEC.block_size, backend=backend, **options)
    (out[:, -weights.shape[1] :] * weights).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def assert_same_blocks(got, wanted):
    """The same choice in 99 of 100 rows, but for neighbours: they share a window, often tie, and either may
    be taken."""
    count = int(max(got.max(), wanted.max())) + 2
    lists = [
        torch.zeros(*x.shape[:3], count, dtype=torch.bool, device=x.device).scatter(3, x.long() + 1, True)[
            ..., 1:
        ]
        for x in (got, wanted)
    ]
    alone = lists[0] ^ lists[1]
    swapped = (alone.sum(-1) == 2) & (alone[..., 1:] & alone[..., :-1]).any(-1)
    different = (alone.any(-1) & ~swapped).float().mean().item()
    assert different <= 0.01, f"{different:.2%} of the lists differ"
    assert torch.equal((got < 0).sum(-1), (wanted < 0).sum(-1)), "the lists have other lengths"


@pytest.mark.parametrize("by_block", [False, True], ids=["by query", "by block"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 5e-5)], ids=str
)
def test_attention_and_gradients_at_the_released_sizes(dtype, tolerance, by_block, monkeypatch, length=9000):
    monkeypatch.setattr(triton, "shared_enough", lambda *_: by_block)
    q, k, v = draw(length, length, dtype)
    blocks = select_blocks(q, k, SPEC, backend="triton")
    weights = normal(1, length, HEADS, DIM, seed=3, dtype=dtype)
    wanted = gradients(q.float(), k.float(), v.float(), blocks, weights.float(), "torch")
    got = gradients(q, k, v, blocks, weights, "triton")
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, wanted, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, tolerance, name)


@pytest.mark.parametrize("lse", ["coarse", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_selection_at_the_released_sizes(dtype, lse, length=9000):
    q, k, _ = draw(length, length, dtype)
    compressed = compress(k, [0], length)
    for tokens in (length, 5):
        got = select_blocks(q[:, -tokens:], k, SPEC, compressed=compressed, lse=lse, backend="triton")
        wide = tuple(x.float() for x in compressed)
        assert_same_blocks(
            got,
            select_blocks(q[:, -tokens:].float(), k.float(), SPEC, compressed=wide, lse=lse, backend="torch"),
        )


def test_both_paths_agree_on_packed_documents(monkeypatch, bounds=(0, 7, 700, 701, 9000, 17_000)):
    q, k, v = draw(bounds[-1], bounds[-1])
    cu = torch.tensor(bounds, device=DEVICE, dtype=torch.int32)
    blocks = select_blocks(q, k, SPEC, cu_seqlens=cu, backend="triton")
    weights = normal(1, bounds[-1], HEADS, DIM, seed=3)
    results = []
    for by_block in (False, True):
        monkeypatch.setattr(triton, "shared_enough", lambda *_, answer=by_block: answer)
        results.append(gradients(q, k, v, blocks, weights, "triton", cu_seqlens=cu))
    for name, a, b in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert_near(b, a.float(), 2e-2, name)
    a, b = bounds[-2:]
    assert_same_blocks(blocks[:, a:b], select_blocks(q[:, a:b], k[:, a:b], SPEC, backend="triton"))


@pytest.mark.large_memory
def test_more_elements_than_32_bits_can_count(
    monkeypatch, length=540_000, tail=64, rows=(5, 6143, 7000, 270_001, 524_287, 539_000)
):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    q, k, v = draw(length, length)
    assert q.numel() > 2**31
    blocks = select_blocks(q, k, SPEC, backend="triton")
    weights = normal(1, tail, HEADS, DIM, seed=3)
    out, *grads = gradients(q, k, v, blocks, weights, "triton")
    monkeypatch.setattr(triton, "shared_enough", lambda *_: False)
    by_query = sparse_attention(q, k, v, blocks, SPEC.block_size, backend="triton")
    for t in rows:
        part = (q[:, t : t + 1].float(), k[:, : t + 1].float(), v[:, : t + 1].float())
        wanted = sparse_attention(*part, blocks[:, t : t + 1], SPEC.block_size, backend="torch")
        assert_near(out[:, t : t + 1], wanted, 2e-2, f"o[{t}] by block")
        assert_near(by_query[:, t : t + 1], wanted, 2e-2, f"o[{t}] by query")
    last = q[:, -tail:].float()
    wanted, *wanted_grads = gradients(last, k.float(), v.float(), blocks[:, -tail:], weights.float(), "torch")
    assert_near(out[:, -tail:], wanted, 2e-2, "o")
    assert not grads[0][:, :-tail].any(), "queries without a share in the loss have no gradient"
    for name, a, b in zip(("dq", "dk", "dv"), (grads[0][:, -tail:], *grads[1:]), wanted_grads, strict=True):
        assert_near(a, b, 2e-2, name)
    wide = tuple(x.float() for x in compress(k, [0], length))
    assert_same_blocks(
        blocks[:, -tail:], select_blocks(last, k.float(), SPEC, compressed=wide, backend="torch")
    )


def compress(k, past, new_tokens):
    """Both levels of compressed keys of the rows of k, with room for all of k and NaN where nothing is
    written."""
    levels = []
    for size, stride in ((SPEC.kernel_size, SPEC.kernel_stride), (SPEC.coarse_size, SPEC.coarse_stride)):
        windows = max(1, num_windows(k.shape[1], size, stride))
        out = torch.full((k.shape[0], windows, *k.shape[2:]), float("nan"), dtype=k.dtype, device=k.device)
        extend_compressed(
            k, out, torch.tensor(past, device=DEVICE), new_tokens, size, stride, backend="triton"
        )
        levels.append(out)
    return tuple(levels)


class Decoding:
    """Two rows of different lengths in one storage, and a step that puts a token behind each and attends with
    it."""

    def __init__(self, lengths, capacity):
        self.lengths = torch.tensor(lengths, device=DEVICE)
        _, self.k, self.v = draw(1, capacity, batch=len(lengths))
        beyond = torch.arange(capacity, device=DEVICE) >= self.lengths[:, None]
        for x in (self.k, self.v):
            x[beyond] = float("nan")  # nobody may look there
        self.levels = compress(self.k, [0] * len(lengths), capacity)
        self.inputs = [
            torch.empty(len(lengths), 1, heads, DIM, dtype=self.k.dtype, device=DEVICE)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]

    def tensors(self):
        return [self.lengths, self.k, self.v, *self.levels, *self.inputs]

    def copy(self):
        other = object.__new__(Decoding)
        other.lengths, other.k, other.v, *rest = (x.clone() for x in self.tensors())
        other.levels, other.inputs = tuple(rest[:2]), rest[2:]
        return other

    def step(self):
        q, new_k, new_v = self.inputs
        place = torch.arange(self.k.shape[1], device=DEVICE) == self.lengths[:, None]
        for store, new in ((self.k, new_k), (self.v, new_v)):
            store.copy_(torch.where(place[..., None, None], new, store))
        for level, size, stride in zip(
            self.levels,
            (SPEC.kernel_size, SPEC.coarse_size),
            (SPEC.kernel_stride, SPEC.coarse_stride),
            strict=True,
        ):
            extend_compressed(self.k, level, self.lengths, 1, size, stride, backend="triton")
        self.lengths.add_(1)
        blocks = select_blocks(q, None, SPEC, compressed=self.levels, lengths=self.lengths, backend="triton")
        return sparse_attention(
            q, self.k, self.v, blocks, SPEC.block_size, lengths=self.lengths, backend="triton"
        ), blocks

    def wanted(self, row, blocks):
        """What row `row` had to give in its last step, in float32 from the plain form."""
        n = int(self.lengths[row])
        parts = (self.inputs[0][row : row + 1], self.k[row : row + 1, :n], self.v[row : row + 1, :n])
        return sparse_attention(
            *(x.float() for x in parts), blocks[row : row + 1], SPEC.block_size, backend="torch"
        )

    def new_inputs(self, step):
        for n, x in enumerate(self.inputs):
            x.copy_(normal(*x.shape, seed=100 + 3 * step + n, dtype=x.dtype))


def test_decode_steps_in_a_cuda_graph(lengths=(9000, 6100), capacity=16_384, steps=60):
    live = Decoding(lengths, capacity)
    live.new_inputs(0)
    live.copy().step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, blocks = live.step()
    eager = live.copy()  # capturing ran nothing: `live` is as it was
    for step in range(steps):
        for one in (live, eager):
            one.new_inputs(step)
        graph.replay()
        wanted, wanted_blocks = eager.step()
        assert torch.equal(blocks, wanted_blocks) and torch.equal(out, wanted), f"step {step}"
    assert live.lengths.tolist() == [n + steps for n in lengths]
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(live.tensors(), eager.tensors(), strict=True)
    )
    for row in range(len(lengths)):
        assert_near(out[row : row + 1], live.wanted(row, blocks), 2e-2)


def test_nothing_waits_for_the_gpu(monkeypatch, bounds=(0, 1, 300, 7000), lengths=(6500, 200), capacity=8192):
    q, k, v = draw(bounds[-1], bounds[-1])
    leaves = [x.requires_grad_() for x in (q.clone(), k, v)]
    cu = torch.tensor(bounds, device=DEVICE)
    decoding = Decoding(lengths, capacity)
    decoding.new_inputs(0)
    for mode in ("default", "error"):  # the first round compiles
        for by_block in (False, True):
            monkeypatch.setattr(triton, "shared_enough", lambda *_, answer=by_block: answer)
            torch.cuda.set_sync_debug_mode(mode)
            try:
                decoding.step()
                blocks = select_blocks(*leaves[:2], SPEC, cu_seqlens=cu, backend="triton")
                sparse_attention(
                    *leaves, blocks, SPEC.block_size, cu_seqlens=cu, backend="triton"
                ).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_growing_context_needs_no_new_kernels(capacity=60_000, lengths=(33_000, 36_864, 41_003, 60_000)):
    """Decoding with caches that hand out views of the tokens they hold, as the model's cache does."""
    kernels = [
        triton_attend.attend_kernel,
        triton_attend.merge_kernel,
        triton_compress.compress_kernel,
        triton_select.lse_kernel,
        triton_select.score_kernel,
        triton_top.top_kernel,
    ]
    if not all(hasattr(kernel, "device_caches") for kernel in kernels):
        pytest.skip("this version of Triton keeps its kernels elsewhere")
    q, k, v = draw(1, capacity)
    levels = compress(k, [0], capacity)
    counts = []
    for n in lengths:
        views = []
        for level, size, stride in zip(
            levels,
            (SPEC.kernel_size, SPEC.coarse_size),
            (SPEC.kernel_stride, SPEC.coarse_stride),
            strict=True,
        ):
            extend_compressed(k, level, n - 1, 1, size, stride, backend="triton")
            views.append(level[:, : num_windows(n, size, stride)])
        blocks = select_blocks(q, k[:, :n], SPEC, compressed=(views[0], views[1]), backend="triton")
        sparse_attention(q, k[:, :n], v[:, :n], blocks, SPEC.block_size, backend="triton")
        counts.append(sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values()))
    assert len(set(counts)) == 1, f"compiled kernels at {lengths} tokens: {counts}"
