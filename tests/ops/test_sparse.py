"""Block selection and block-sparse attention: tiled forms against the reference implementations."""

import math
from functools import partial

import pytest
import torch

from opensala.ops import BlockSpec, compress_keys, extend_compressed, select_blocks, sparse_attention
from opensala.ops.sparse import attend, cpp, select
from tests.ops.grid import BACKENDS

SMALL = BlockSpec(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=2, window_size=32, topk=4)
RELEASED_LIKE = BlockSpec(window_size=128, topk=4)
# The Triton kernels have their own file: the interpreter needs smaller shapes.
SPARSE_BACKENDS = [x.values[0] for x in BACKENDS if x.values[0].name != "triton"]
SHAPES = [(700, 700), (700, 37), (900, 5), (901, 1), (1000, 333), (130, 130)]


def draw(length, tokens, heads=4, kv_heads=2, dim=16, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed + length * 7 + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        normal(batch, tokens, heads, dim),
        normal(batch, length, kv_heads, dim),
        normal(batch, length, kv_heads, dim),
    )


CPU_BACKENDS = [("torch", torch.float64), ("torch", torch.float32), ("cpp", torch.float32)]
CPU_IDS = ["torch-float64", "torch-float32", "cpp-float32"]


def assert_selected(got, wanted, dtype):
    """The same blocks in every row; in float32 near-ties may fall the other way in one row of 500."""
    different = (got != wanted).any(-1).double().mean()
    assert different <= (0 if dtype == torch.float64 else 0.002), f"{different:.4f} of the rows differ"


@pytest.mark.parametrize("lse", ["coarse", "exact"])
@pytest.mark.parametrize("spec", [SMALL, RELEASED_LIKE], ids=["small", "released-like"])
@pytest.mark.parametrize(("length", "tokens"), SHAPES, ids=str)
def test_selection_equals_naive(length, tokens, spec, lse):
    q, k, _ = draw(length, tokens)
    wanted = select_blocks(q, k, spec, lse=lse, backend="naive")
    for backend, dtype in CPU_BACKENDS:
        assert_selected(
            select_blocks(q.to(dtype), k.to(dtype), spec, lse=lse, backend=backend), wanted, dtype
        )


ODD = [
    SMALL._replace(init_blocks=0, kernel_size=40),
    SMALL._replace(kernel_stride=8),
    SMALL._replace(window_size=0, topk=9),
    BlockSpec(kernel_size=6, kernel_stride=3, block_size=15, init_blocks=3, window_size=30, topk=5),
    BlockSpec(kernel_size=4, kernel_stride=2, window_size=128, topk=4),
]
ODD_NAMES = [
    "wide windows",
    "two windows a block",
    "no local window",
    "nothing a power of two",
    "fine windows",
]


@pytest.mark.parametrize("spec", ODD, ids=ODD_NAMES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 60), (6, 2, 20), (8, 1, 64)])
def test_selection_for_any_spec_and_head_grouping(heads, kv_heads, dim, spec):
    q, k, _ = draw(600, 450, heads, kv_heads, dim)
    wanted = select_blocks(q, k, spec, backend="naive")
    for backend, dtype in CPU_BACKENDS:
        assert_selected(select_blocks(q.to(dtype), k.to(dtype), spec, backend=backend), wanted, dtype)


@pytest.mark.parametrize(("backend", "dtype"), CPU_BACKENDS, ids=CPU_IDS)
def test_selection_does_not_depend_on_tiles(backend, dtype, monkeypatch):
    q, k, _ = (x.to(dtype) for x in draw(700, 650, 6, 2))
    wanted = select_blocks(q, k, SMALL, backend=backend)
    for elements in (1, 60, 20_000):
        monkeypatch.setattr(select, "TILE_ELEMENTS", elements)
        monkeypatch.setattr(cpp, "SELECT_ROWS", elements)
        assert torch.equal(select_blocks(q, k, SMALL, backend=backend), wanted)


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 40), (3, 64), (6, 24), (9, 16)], ids=str)
@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_a_query_alone_chooses_as_among_others_to_the_last_bit(heads, dim, lse):
    """Windows have the same numbers in different orders, so that rounding alone tells the blocks apart: sums
    in another order would choose others."""
    generator = torch.Generator().manual_seed(heads)
    numbers = 30 * torch.randn(dim, generator=generator)
    length, tokens = 1500, 40
    k1, k2 = (
        torch.stack([numbers[torch.randperm(dim, generator=generator)] for _ in range(2 * n)]).view(n, 2, dim)
        for n in ((length - size) // stride + 1 for size, stride in ((8, 4), (32, 16)))
    )
    q = torch.ones(tokens, 2 * heads, dim)
    together = cpp.cpp_select_sequence(q, k1, k2, length, SMALL, dim**-0.5, lse)
    for t in range(tokens):
        alone = cpp.cpp_select_sequence(q[t : t + 1], k1, k2, length - tokens + t + 1, SMALL, dim**-0.5, lse)
        assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_exact_ties_fall_as_topk_lets_them(backend):
    """Few different keys: most blocks tie with others, and the choice among them is torch.topk's over the
    visible blocks."""
    generator = torch.Generator().manual_seed(5)
    kinds = torch.randn(3, 1, 16, generator=generator)
    k = kinds[torch.randint(3, (1500 // 16 + 1,), generator=generator)].repeat_interleave(16, 0)[:1500][None]
    q = torch.randn(1, 1500, 2, 16, generator=generator)
    wanted = select_blocks(q.double(), k.double(), SMALL, backend="naive")
    got = select_blocks(q, k, SMALL, backend=backend)
    assert_selected(got, wanted, torch.float32)


def test_rows_of_different_lengths():
    q, k, v = (x.float() for x in draw(700, 3, batch=2))
    lengths = torch.tensor([700, 421])
    k[1, 421:] = v[1, 421:] = float("nan")  # room that is not in use yet
    for backend in ("naive", "torch", "cpp"):
        blocks = select_blocks(q, k, SMALL, lengths=lengths, backend=backend)
        out = sparse_attention(q, k, v, blocks, 16, lengths=lengths, backend=backend)
        for row, n in enumerate(lengths.tolist()):
            alone = (q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n])
            wanted = select_blocks(*alone[:2], SMALL, backend="naive")
            assert torch.equal(blocks[row : row + 1], wanted)
            torch.testing.assert_close(
                out[row : row + 1], sparse_attention(*alone, wanted, 16, backend="naive")
            )


def test_compressed_keys_grow_as_keys_come():
    _, k, _ = draw(300, 1)
    for backend in ("naive", "torch"):
        out, past = torch.full((1, 100, 2, 16), float("nan"), dtype=k.dtype), 0
        for step in (1, 7, 40, 3, 100, 149):
            extend_compressed(k, out, torch.tensor([past]), step, 8, 4, backend=backend)
            past += step
        wanted = compress_keys(k, 8, 4, backend="naive")
        torch.testing.assert_close(out[:, : wanted.shape[1]], wanted)
        assert out[:, wanted.shape[1] :].isnan().all()
    with pytest.raises(ValueError, match="74 windows; k has room for 300 keys, out for 10 windows"):
        extend_compressed(k, out[:, :10], 0, 300, 8, 4)


@pytest.mark.parametrize("length", [126, 127, 128, 129, 130])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_denominator_changes_level_with_the_first_coarse_window(backend, length):
    """Few blocks of few tokens: choices are open already where the second level of compressed keys begins."""
    spec = BlockSpec(kernel_size=32, kernel_stride=16, block_size=16, window_size=16, topk=4)
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(40, length, heads, 16, generator=generator) * 2 for heads in (8, 1))
    wanted = select_blocks(q[:, -3:].double(), k.double(), spec, backend="naive")
    assert torch.equal(select_blocks(q[:, -3:], k, spec, backend=backend), wanted)


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
    for backend in ("torch", "cpp"):
        blocks = select_blocks(q.float() * 300, k.float() * 300, SMALL, backend=backend)
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
    (
        o * torch.randn(o.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(o)
    ).sum().backward()
    return o, *(x.grad for x in leaves)


@pytest.mark.parametrize("spec", [SMALL, RELEASED_LIKE], ids=["small", "released-like"])
@pytest.mark.parametrize(("length", "tokens"), SHAPES, ids=str)
def test_attention_and_gradients_equal_naive(length, tokens, spec):
    q, k, v = draw(length, tokens)
    blocks = select_blocks(q, k, spec)
    wanted = gradients("naive", q, k, v, blocks, spec)
    for backend in SPARSE_BACKENDS:
        run = partial(gradients, backend.name)
        backend.compare(lambda *x, run=run, spec=spec: run(*x, spec), wanted, q, k, v, blocks)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "size"),
    [(1, 1, 60, 60, 16), (6, 2, 20, 33, 8), (8, 1, 64, 64, 64), (16, 1, 128, 16, 24)],
)
def test_attention_for_any_grouping_width_and_block(heads, kv_heads, dim, value_dim, size):
    q, k, _ = draw(330, 70, heads, kv_heads, dim)
    v = torch.randn(
        1, 330, kv_heads, value_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    spec = SMALL._replace(block_size=size, kernel_stride=size // 2, kernel_size=size, window_size=size)
    blocks = select_blocks(q, k, spec)
    wanted = gradients("naive", q, k, v, blocks, spec)
    for backend in SPARSE_BACKENDS:
        backend.compare(lambda *x: gradients(backend.name, *x, spec), wanted, q, k, v, blocks)  # noqa: B023


def test_attention_over_any_lists_of_blocks(monkeypatch):
    q, k, v = draw(300, 300)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.full((1, 300, 2, 6), -1)
    for t in range(300):
        for h in range(2):
            others = torch.randperm(t // 16 + 1, generator=generator)[
                :4
            ]  # in any order, own block not always there
            blocks[0, t, h, : len(others)] = others
    wanted = gradients("naive", q, k, v, blocks, SMALL)
    for pairs in (64, 1 << 16):
        monkeypatch.setattr(attend, "TILE_PAIRS", pairs)
        monkeypatch.setattr(cpp, "TILE_ROWS", pairs)
        for backend in SPARSE_BACKENDS:
            run = partial(gradients, backend.name)
            backend.compare(lambda *x, run=run: run(*x, SMALL), wanted, q, k, v, blocks)


def test_the_gradient_is_summed_in_the_same_order_every_time():
    q, k, v = (x.float() for x in draw(900, 900, 4, 1))
    blocks = select_blocks(q, k, SMALL)
    first, second = (gradients("cpp", q, k, v, blocks, SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_all_blocks_is_dense_attention():
    q, k, v = draw(200, 200)
    spec = SMALL._replace(topk=20)
    got = sparse_attention(q, k, v, select_blocks(q, k, spec), 16)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
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


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_low_precision_stays_near_float64(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in draw(400, 400))
    blocks = select_blocks(q, k, SMALL)
    wanted = sparse_attention(q.double(), k.double(), v.double(), blocks, 16, backend="naive")
    for backend in ("torch", "cpp"):
        got = sparse_attention(q, k, v, blocks, 16, backend=backend)
        assert got.dtype == dtype
        assert (got - wanted).abs().max() < tolerance
    wanted = select_blocks(q.float(), k.float(), SMALL, backend="torch")
    different = (select_blocks(q, k, SMALL, backend="cpp") != wanted).any(-1).float().mean()
    assert different <= 0.01  # coarse numbers tie more often than float32 ones


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
        select_blocks(q.float(), k.float(), SMALL, backend="torch")
    assert max(sizes) < 3 * select.TILE_ELEMENTS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: select_blocks(q, k, SMALL, lse="sum"), "lse must be one of"),
        (
            lambda q, k, v: select_blocks(q, k, SMALL, search="fast"),
            "search must be one of exact, hierarchical",
        ),
        (
            lambda q, k, v: select_blocks(
                q, k, RELEASED_LIKE._replace(topk=40), search="hierarchical", regions=2
            ),
            "regions must be at least 3, got 2",
        ),
        (
            lambda q, k, v: select_blocks(q, k, SMALL, lengths=51),
            r"from 50 \(the queries\) to 50 \(the keys\)",
        ),
        (
            lambda q, k, v: select_blocks(q, k, SMALL, lengths=50, cu_seqlens=torch.tensor([0, 50])),
            "not with lengths",
        ),
        (lambda q, k, v: select_blocks(q[:, :, :3], k, SMALL), "3 query heads do not divide"),
        (lambda q, k, v: select_blocks(q, None, SMALL), "needs k"),
        (lambda q, k, v: sparse_attention(q, k, v, torch.zeros(1, 50, 1, 4), 16), "blocks must be"),
        (
            lambda q, k, v: sparse_attention(
                q, k, v, torch.zeros(1, 50, 2, 4).long(), 16, cu_seqlens=torch.tensor([0, 9])
            ),
            "rise from 0 to 50",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw(50, 50))


def test_spec_counts():
    released = BlockSpec()
    assert (released.num_blocks, released.ratio, released.coarse_size, released.coarse_stride) == (
        96,
        4,
        128,
        64,
    )
    assert math.isclose(released.num_blocks * released.block_size, 6144)
