"""Block selection and block-sparse attention: tiled forms against the plain statements."""

import math

import pytest
import torch

from opensala.ops import BlockSpec, compress_keys, select_blocks, sparse_attention
from opensala.ops.sparse import attend, select

SMALL = BlockSpec(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=2, window_size=32, topk=4)
RELEASED_LIKE = BlockSpec(window_size=128, topk=4)
SHAPES = [(700, 700), (700, 37), (900, 5), (901, 1), (1000, 333), (130, 130)]


def draw(length, tokens, heads=4, kv_heads=2, dim=16, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed + length * 7 + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(batch, tokens, heads, dim), normal(batch, length, kv_heads, dim), normal(batch, length, kv_heads, dim)


@pytest.mark.parametrize("lse", ["coarse", "exact"])
@pytest.mark.parametrize("spec", [SMALL, RELEASED_LIKE], ids=["small", "released-like"])
@pytest.mark.parametrize(("length", "tokens"), SHAPES, ids=str)
def test_selection_equals_naive(length, tokens, spec, lse):
    q, k, _ = draw(length, tokens)
    wanted = select_blocks(q, k, spec, lse=lse, backend="naive")
    assert torch.equal(select_blocks(q, k, spec, lse=lse), wanted)
    # in float32 only near-ties may differ
    different = (select_blocks(q.float(), k.float(), spec, lse=lse) != wanted).any(-1).float().mean()
    assert different <= 0.002


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 1)])
def test_selection_for_any_head_grouping_and_tile(heads, kv_heads, monkeypatch):
    q, k, _ = draw(600, 450, heads, kv_heads)
    wanted = select_blocks(q, k, SMALL, backend="naive")
    for elements in (1, 20_000, 1 << 22):
        monkeypatch.setattr(select, "TILE_ELEMENTS", elements)
        assert torch.equal(select_blocks(q, k, SMALL), wanted)


def test_forced_blocks_are_always_taken():
    q, k, _ = draw(900, 900)
    blocks = select_blocks(q, k, SMALL)[0, :, 0]
    for t in (0, 15, 16, 100, 333, 899):
        chosen, own = set(blocks[t].tolist()) - {-1}, t // 16
        assert {b for b in (0, 1) if b <= own} | set(range(max(0, own - 2), own + 1)) <= chosen
        assert max(chosen) == own
        assert len(chosen) == min(SMALL.num_blocks, own + 1)


def test_a_huge_score_does_not_push_out_forced_blocks():
    q, k, _ = draw(900, 900)
    blocks = select_blocks(q.float() * 300, k.float() * 300, SMALL)
    assert (blocks[0, 200:, 0] == (torch.arange(200, 900) // 16)[:, None]).any(-1).all()


def test_selection_finds_a_planted_key():
    q, k, _ = draw(2000, 2000)
    k[0, 805:825, :] = q[0, 1999, :1] * 3
    assert 50 in select_blocks(q, k, SMALL)[0, 1999, 0].tolist()


def test_compression_equals_naive_and_has_full_windows_only():
    _, k, _ = draw(100, 1)
    for size, stride in ((8, 4), (32, 16), (128, 64)):
        got = compress_keys(k, size, stride)
        assert got.shape[1] == max(0, (100 - size) // stride + 1)
        torch.testing.assert_close(got, compress_keys(k, size, stride, backend="naive"))


def gradients(backend, q, k, v, blocks, spec, cu_seqlens=None):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = sparse_attention(*leaves, blocks, spec.block_size, backend=backend, cu_seqlens=cu_seqlens)
    (o * torch.randn(o.shape, generator=torch.Generator().manual_seed(3), dtype=o.dtype)).sum().backward()
    return o, *(x.grad for x in leaves)


@pytest.mark.parametrize("spec", [SMALL, RELEASED_LIKE], ids=["small", "released-like"])
@pytest.mark.parametrize(("length", "tokens"), SHAPES, ids=str)
def test_attention_and_gradients_equal_naive(length, tokens, spec):
    q, k, v = draw(length, tokens)
    blocks = select_blocks(q, k, spec)
    for got, wanted in zip(gradients("torch", q, k, v, blocks, spec), gradients("naive", q, k, v, blocks, spec), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-10)  # float64: rounding only


def test_attention_over_any_lists_of_blocks(monkeypatch):
    q, k, v = draw(300, 300)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.full((1, 300, 2, 6), -1)
    for t in range(300):
        for h in range(2):
            others = torch.randperm(t // 16 + 1, generator=generator)[:4]  # in any order, own block not always there
            blocks[0, t, h, : len(others)] = others
    for pairs in (64, 1 << 16):
        monkeypatch.setattr(attend, "TILE_PAIRS", pairs)
        for got, wanted in zip(gradients("torch", q, k, v, blocks, SMALL), gradients("naive", q, k, v, blocks, SMALL), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-10)


def test_all_blocks_is_dense_attention():
    q, k, v = draw(200, 200)
    spec = SMALL._replace(topk=20)
    got = sparse_attention(q, k, v, select_blocks(q, k, spec), 16)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, dense.transpose(1, 2))


def test_packed_documents_equal_separate_ones():
    q, k, v = draw(500, 500)
    cu = torch.tensor([0, 3, 180, 500])
    blocks = select_blocks(q, k, SMALL, cu_seqlens=cu)
    packed = gradients("torch", q, k, v, blocks, SMALL, cu)
    for a, b in ((0, 3), (3, 180), (180, 500)):
        alone = select_blocks(q[:, a:b], k[:, a:b], SMALL)
        assert torch.equal(blocks[:, a:b], alone)
        got = sparse_attention(q[:, a:b], k[:, a:b], v[:, a:b], alone, 16)
        torch.testing.assert_close(packed[0][:, a:b], got)
    for got, wanted in zip(packed, gradients("naive", q, k, v, blocks, SMALL, cu), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_stays_near_float64(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in draw(400, 400))
    blocks = select_blocks(q, k, SMALL)
    wanted = sparse_attention(q.double(), k.double(), v.double(), blocks, 16, backend="naive")
    got = sparse_attention(q, k, v, blocks, 16)
    assert got.dtype == dtype
    assert (got - wanted).abs().max() < tolerance


def test_memory_of_selection_is_linear():
    """The score matrix of 20,000 tokens would have 10^8 elements; a tile has at most 2^22."""
    q, k, _ = draw(20_000, 20_000, heads=1, kv_heads=1, dim=4)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.untyped_storage().nbytes() // out.element_size() if out.numel() else 0)
            return out

    with Watch():
        select_blocks(q.float(), k.float(), SMALL)
    assert max(sizes) < 3 * select.TILE_ELEMENTS


@pytest.mark.parametrize(("call", "message"), [
    (lambda q, k, v: select_blocks(q, k, SMALL, lse="sum"), "lse must be one of"),
    (lambda q, k, v: select_blocks(q[:, :, :3], k, SMALL), "3 query heads do not divide"),
    (lambda q, k, v: select_blocks(q, None, SMALL), "needs k"),
    (lambda q, k, v: sparse_attention(q, k, v, torch.zeros(1, 50, 1, 4), 16), "blocks must be"),
    (lambda q, k, v: sparse_attention(q, k, v, torch.zeros(1, 50, 2, 4).long(), 16, cu_seqlens=torch.tensor([0, 9])), "rise from 0 to 50"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw(50, 50))


def test_spec_counts():
    released = BlockSpec()
    assert (released.num_blocks, released.ratio, released.coarse_size, released.coarse_stride) == (96, 4, 128, 64)
    assert math.isclose(released.num_blocks * released.block_size, 6144)
