"""Selection and attention over pages: many sequences in a call, against the contiguous form of each.

Every pool begins as NaN and its pages are shuffled: whatever reads a slot that nobody wrote shows.
"""

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from opensala.ops import (
    BlockSpec,
    KVPages,
    PageTable,
    compress_keys,
    paged_attention,
    select_blocks,
    select_blocks_paged,
    sparse_attention,
    store_kv,
)
from opensala.ops.sparse import cpp_paged
from tests.ops.grid import assert_close

SMALL = BlockSpec(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=4)
SPECS = {
    "released": BlockSpec(window_size=128, topk=4),
    "small": SMALL,
    "96 tokens a block": BlockSpec(32, 16, 96, 1, 192, 3),
    "a second-level window spans two blocks": BlockSpec(32, 32, 64, 1, 128, 3),
    "windows wider than a block": SMALL._replace(kernel_size=40, init_blocks=2),
    "nothing a power of two": BlockSpec(6, 3, 15, 3, 30, 5),
    "fine windows": BlockSpec(4, 2, 64, 1, 128, 4),
}
# With wide windows, selection begins before the second level does.
INVARIANT = {
    name: SPECS[name]
    for name in ("small", "windows wider than a block", "nothing a power of two", "fine windows")
}
# Query heads, kv heads, D, Dv: groups of 1, 2, 3 and 16.
HEADS = [(2, 2, 32, 32), (4, 2, 64, 20), (6, 2, 64, 64), (16, 1, 60, 64)]


@dataclass
class Case:
    """Sequences of given lengths, their keys and values, and a pool with a page order of its own."""

    spec: BlockSpec
    lengths: list[int]
    heads: tuple[int, int, int, int] = (4, 2, 32, 32)
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype | None = None
    sparse: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        hq, hkv, dim, value_dim = self.heads
        generator = torch.Generator().manual_seed(sum(self.lengths) + hq)

        def normal(*shape: int) -> list[Tensor]:
            return [
                torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(self.dtype)
                for n in self.lengths
            ]

        self.q, self.k, self.v = normal(hq, dim), normal(hkv, dim), normal(hkv, value_dim)
        self.sparse = self.sparse or [n % 3 != 1 for n in range(len(self.lengths))]
        need = [-(-n // self.spec.block_size) for n in self.lengths]
        order = torch.randperm(sum(need) + 3, generator=generator, dtype=torch.int32)
        self.pages = torch.full((len(need), max(need) + 1), -(1 << 30), dtype=torch.int32)
        for n, pages in enumerate(order[: sum(need)].split(need)):
            self.pages[n, : len(pages)] = pages
        self.num_pages = len(order)
        self.pool = self.new_pool()

    def new_pool(self) -> KVPages:
        _, hkv, dim, value_dim = self.heads
        s, kind = self.spec, self.pool_dtype or self.dtype
        slots = (
            s.block_size,
            s.block_size,
            -(-s.block_size // s.kernel_stride),
            -(-s.block_size // s.coarse_stride),
        )
        dims = (dim, value_dim, dim, dim)
        return KVPages(
            *(
                torch.full((self.num_pages, n, hkv, d), math.nan, dtype=kind)
                for n, d in zip(slots, dims, strict=True)
            )
        )

    def table(self, starts: list[int], ends: list[int]) -> PageTable:
        new = torch.tensor([0, *(b - a for a, b in zip(starts, ends, strict=True))])
        ints = [new.cumsum(0), torch.tensor(ends), self.pages, torch.tensor(self.sparse)]
        table = PageTable(*(x.int() for x in ints))
        table.check_integrity(int(new.sum()), self.num_pages, self.spec.block_size)
        return table

    def packed(self, x: list[Tensor], starts: list[int], ends: list[int]) -> Tensor:
        return torch.cat([y[a:b] for y, a, b in zip(x, starts, ends, strict=True)])

    def store(self, starts: list[int], ends: list[int], pool: KVPages, backend: str) -> PageTable:
        table = self.table(starts, ends)
        k, v = (self.packed(x, starts, ends) for x in (self.k, self.v))
        store_kv(k, v, pool, table, self.spec, backend=backend)
        return table

    def run(
        self,
        starts: list[int],
        backend: str,
        ends: list[int] | None = None,
        past: bool = True,
        **options: object,
    ) -> tuple[Tensor, Tensor]:
        """Blocks and output of tokens starts ... ends of each sequence; those before are stored in a call of
        their own unless they are already there."""
        ends = self.lengths if ends is None else ends
        if past:
            self.store([0] * len(starts), starts, self.pool, backend)
        table = self.store(starts, ends, self.pool, backend)
        q = self.packed(self.q, starts, ends)
        blocks = select_blocks_paged(q, self.pool, table, self.spec, backend=backend, **options)
        return blocks, paged_attention(q, self.pool, table, blocks, self.spec, backend=backend)

    def stored(self, n: int) -> tuple[Tensor, ...]:
        """Keys, values and both levels of compressed keys of sequence n, read from the pool slot by slot."""
        s, length = self.spec, self.lengths[n]
        ends = (
            range(length),
            range(length),
            range(s.kernel_size - 1, length, s.kernel_stride),
            range(s.coarse_size - 1, length, s.coarse_stride),
        )
        steps = (1, 1, s.kernel_stride, s.coarse_stride)
        rows = []
        for x, tokens, step in zip(self.pool, ends, steps, strict=True):
            places = [(int(self.pages[n, e // s.block_size]), e % s.block_size // step) for e in tokens]
            rows.append(torch.stack([x[place] for place in places]) if places else x[:0, 0])
        return tuple(rows)


def dense_blocks(case: Case, n: int, start: int) -> Tensor:
    own = torch.arange(start, case.lengths[n])[:, None] // case.spec.block_size
    block = torch.arange(int(own.max()) + 1)
    return torch.where(block <= own, block, -1)[:, None].expand(-1, case.heads[1], -1).int()


def alone(case: Case, start: list[int], backend: str, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """The same from each sequence alone, by the contiguous forms, in the dtype of the pool."""
    chosen, outputs = [], []
    for n, a in enumerate(start):
        k, v, *levels = (x[None].to(case.dtype) for x in case.stored(n))
        q = case.q[n][None, a:]
        if not q.shape[1]:
            continue
        compressed = None if backend == "naive" else tuple(levels)
        blocks = select_blocks(q, k, case.spec, compressed=compressed, backend=backend, **options)
        attended = blocks if case.sparse[n] else dense_blocks(case, n, a)[None]
        chosen.append(blocks[0] if case.sparse[n] else torch.full_like(blocks[0], -1))
        outputs.append(sparse_attention(q, k, v, attended, case.spec.block_size, backend=backend)[0])
    return chosen, outputs


def mixed(spec: BlockSpec) -> tuple[list[int], list[int]]:
    """Lengths and cached tokens of a call: around ends of blocks and windows, and of the room for all."""
    size, room = spec.block_size, spec.block_size * spec.num_blocks
    lengths = [1, size, size + 1, room, room + 1, room + 3 * size - 1, 4 * room + spec.coarse_size, 2 * room]
    cached = [0, 0, size, room - 3, room, 0, 4 * room, 2 * room]  # the last sequence has no new tokens
    return lengths, cached


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_call_of_many_sequences_equals_each_alone_bit_for_bit(spec, heads):
    lengths, cached = mixed(spec)
    case = Case(spec, lengths, heads)
    blocks, out = case.run(cached, "cpp")
    chosen, outputs = alone(case, cached, "cpp")
    assert torch.equal(blocks, torch.cat(chosen))
    assert not out.isnan().any() and torch.equal(out, torch.cat(outputs))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    # two orders of the same sums; naive is the same code as the contiguous form
    [("naive", torch.float64, 1e-12), ("torch", torch.float64, 1e-11), ("cpp", torch.float32, 2e-5)],
)
def test_every_form_equals_the_naive_contiguous_one(spec, backend, dtype, tolerance):
    lengths, cached = mixed(spec)
    case = Case(spec, lengths[:6], (4, 2, 16, 12), torch.float64)
    _, wanted = case.run(cached[:6], "naive")
    chosen, outputs = alone(case, cached[:6], "naive")
    assert_close(wanted, torch.cat(outputs), 1e-12)
    fast = Case(spec, lengths[:6], (4, 2, 16, 12), dtype)
    blocks, out = fast.run(cached[:6], backend)
    same = (blocks == torch.cat(chosen)).all(-1).all(-1)
    assert same.double().mean() >= (0.99 if dtype == torch.float32 else 1), "more than near-ties differ"
    assert_close(out[same], wanted[same], tolerance)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("backend", ["naive", "torch", "cpp"])
def test_pages_hold_every_window_that_ends_in_them_and_nothing_else(spec, backend):
    case = Case(spec, [7 * spec.block_size + 5, spec.kernel_size - 1, spec.coarse_size], dtype=torch.float32)
    cuts = [[0, 0, 0], [3, 3, 3], [70, 3, spec.coarse_size - 1], case.lengths]
    for starts, ends in zip(cuts, cuts[1:], strict=False):
        case.store(starts, [min(e, n) for e, n in zip(ends, case.lengths, strict=True)], case.pool, backend)
    filled = [0] * 4
    for n in range(3):
        keys, values, *levels = case.stored(n)
        assert torch.equal(keys, case.k[n]) and torch.equal(values, case.v[n])
        for level, sizes in zip(levels, [spec[:2], (spec.coarse_size, spec.coarse_stride)], strict=True):
            wanted = compress_keys(case.k[n].double()[None], *sizes, backend="naive")[0]
            assert_close(level, wanted, 1e-6)  # sums of up to 160 numbers of order one
        filled = [f + len(x) for f, x in zip(filled, (keys, values, *levels), strict=True)]
    assert [int((~x.isnan()).any(-1).any(-1).sum()) for x in case.pool] == filled


def random_cuts(case: Case, seed: int) -> list[tuple[list[int], list[int]]]:
    """Calls that bring all sequences to their ends: in each, some of them advance by some tokens."""
    draw, at, calls = random.Random(seed), [0] * len(case.lengths), []
    while at != case.lengths:
        step = [draw.choice([0, 1, 1, 7, 64, 300]) for _ in at]
        ends = [min(a + s, n) for a, s, n in zip(at, step, case.lengths, strict=True)]
        calls.append((at, ends))
        at = ends
    return calls


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("search", ["exact", "hierarchical"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("spec", INVARIANT.values(), ids=INVARIANT)
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_cuts_company_or_threads(spec, heads, search, pool_dtype, threads):
    case = Case(spec, [700, 333, 90], heads, pool_dtype=pool_dtype, sparse=[1, 0, 1])
    options = {"search": search, "regions": 2}
    threads(1)
    blocks, out = case.run([0, 0, 0], "cpp", **options)
    whole = [
        (b, o, *case.stored(n))
        for n, (b, o) in enumerate(zip(*(x.split(case.lengths) for x in (blocks, out)), strict=True))
    ]
    for seed in range(3):
        threads(1 + seed)
        case.pool = case.new_pool()
        parts: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in case.lengths]
        for starts, ends in random_cuts(case, seed):
            news = [b - a for a, b in zip(starts, ends, strict=True)]
            for made, pieces in zip(
                case.run(starts, "cpp", ends, past=False, **options), zip(*parts, strict=True), strict=True
            ):
                for piece, new in zip(pieces, made.split(news), strict=True):
                    piece.append(new)
        for n, wanted in enumerate(whole):
            got = (*(torch.cat(x) for x in parts[n]), *case.stored(n))
            for name, a, b in zip(("blocks", "out", "keys", "values", "k1", "k2"), got, wanted, strict=True):
                assert torch.equal(a, b), f"{name} of sequence {n} with {1 + seed} threads"


def test_tiles_change_no_bit(monkeypatch):
    case = Case(SMALL, [700, 500], (6, 2, 20, 20))
    wanted = case.run([0, 3], "cpp")
    for rows in (1, 60, 20_000):
        monkeypatch.setattr(cpp_paged, "TILE_ROWS", rows)
        monkeypatch.setattr(cpp_paged, "SELECT_ROWS", rows)
        assert all(map(torch.equal, case.run([0, 3], "cpp"), wanted))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_pools(backend, pool_dtype):
    lengths, cached = mixed(SMALL)
    case = Case(SMALL, lengths, (4, 2, 60, 32), pool_dtype=pool_dtype)
    blocks, out = case.run(cached, backend)
    for n, k in enumerate(case.k):  # rounded once, to the nearest
        keys, _, *levels = case.stored(n)
        assert torch.equal(keys, k.to(pool_dtype))
        for level, sizes in zip(levels, [SMALL[:2], (SMALL.coarse_size, SMALL.coarse_stride)], strict=True):
            mean = compress_keys(keys.double()[None], *sizes, backend="naive")[0]
            assert torch.equal(level, mean.float().to(pool_dtype))
    chosen, outputs = alone(case, cached, "cpp")
    same = (blocks == torch.cat(chosen)).all(-1).all(-1)
    assert same.all() if backend == "cpp" else same.float().mean() > 0.99
    assert_close(out[same], torch.cat(outputs)[same].double(), 1e-9 if backend == "cpp" else 2e-5)


def test_compressed_keys_have_the_same_bits_in_pytorch_and_cpp():
    case = Case(SPECS["released"], [1000, 77])
    pools = [case.new_pool(), case.new_pool()]
    for pool, backend in zip(pools, ("torch", "cpp"), strict=True):
        case.store([0, 0], case.lengths, pool, backend)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*pools, strict=True))


@pytest.mark.parametrize("backend", ["naive", "torch", "cpp"])
def test_hierarchical_selection_reads_pages(backend):
    case = Case(SMALL, [1500, 40, 700], (4, 2, 16, 16), torch.float32 if backend == "cpp" else torch.float64)
    cached, options = [1480, 0, 690], {"search": "hierarchical", "regions": 2}
    blocks, _ = case.run(cached, backend, **options)
    chosen, _ = alone(case, cached, backend, **options)
    assert torch.equal(blocks, torch.cat(chosen))
    assert not torch.equal(blocks, case.run(cached, backend)[0]), "two regions must miss something here"


@pytest.mark.parametrize("backend", ["naive", "torch", "cpp"])
def test_without_blocks_all_are_dense(backend):
    case = Case(SMALL, [200, 33], sparse=[1, 1])
    case.run([150, 0], backend)
    table = case.table([150, 0], case.lengths)
    q = case.packed(case.q, [150, 0], case.lengths)
    out = paged_attention(q, case.pool, table, None, SMALL, backend=backend)
    case.sparse = [0, 0]
    assert_close(out, torch.cat(alone(case, [150, 0], "naive")[1]).double(), 2e-5)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_rows_of_dense_sequences_may_hold_anything(backend):
    case = Case(SMALL, [200, 150], sparse=[0, 1])
    blocks, out = case.run([150, 100], backend)
    blocks[:50] = 1 << 30
    q, table = case.packed(case.q, [150, 100], case.lengths), case.table([150, 100], case.lengths)
    assert torch.equal(paged_attention(q, case.pool, table, blocks, SMALL, backend=backend), out)


def test_pools_may_be_slices_of_a_larger_tensor():
    case = Case(SMALL, [300, 64])
    wanted = case.run([280, 0], "cpp")
    case.pool = KVPages(*(torch.stack([x, x], 2)[:, :, 1] for x in case.new_pool()))
    assert not case.pool.keys.is_contiguous()
    assert all(map(torch.equal, case.run([280, 0], "cpp"), wanted))


def test_numbers_that_would_read_or_write_elsewhere_are_found():
    case = Case(SMALL, [100, 40])
    good = case.table([90, 0], [100, 40])
    size = (50, case.num_pages, 16)
    for change, message in (
        (
            {"cu_seqlens": torch.tensor([0, 10, 49])},
            r"from 0 to the 50 tokens of the call, got \[0, 10, 49\]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 50])},
            r"sequence 1 must have 0 to lengths\[1\] = 40 new tokens, got 45",
        ),
        ({"pages": good.pages[:, :6]}, r"pages\[0\] must list 7 pages"),
        ({"lengths": torch.tensor([100, 112])}, r"pages\[1\] must list 7 pages from 0 to"),
        ({"pages": good.pages[:1].expand(2, -1)}, "are written to, so they may be in use only once"),
    ):
        with pytest.raises(ValueError, match=message):
            good._replace(**change).check_integrity(*size)
    shared = good.pages.clone()
    shared[1, 0] = shared[0, 0]  # a full page of a common beginning: read by both, written by none
    good._replace(pages=shared, cu_seqlens=torch.tensor([0, 10, 30])).check_integrity(30, *size[1:])


def test_what_does_not_fit_is_refused():
    case = Case(SMALL, [40])
    table = case.table([0], [40])
    q, k, v = case.q[0], case.k[0], case.v[0]
    attend = paged_attention
    for call, message in (
        (lambda: store_kv(k[:, :1], v, case.pool, table, SMALL), r"k must be \[T, Hkv, D\] = \[40, 2, 32\]"),
        (lambda: store_kv(k, v[:-1], case.pool, table, SMALL), r"v must be \[T, Hkv, D\] = \[40, 2, 32\]"),
        (lambda: store_kv(k, v, case.pool, table, SMALL._replace(kernel_stride=2)), r"pool.k1 must be \["),
        (
            lambda: store_kv(k, v, case.pool._replace(k2=case.pool.k2.half()), table, SMALL),
            "pool.k2 must be .* in torch.float32 .* got .* in torch.float16",
        ),
        (
            lambda: store_kv(k, v, case.pool, table._replace(lengths=table.lengths.long()), SMALL),
            r"table.lengths must be contiguous int32 \[1\], got torch.int64",
        ),
        (
            lambda: attend(q[:, :3], case.pool, table, None, SMALL),
            r"q must be \[T, a multiple of 2 heads, 32\]",
        ),
        (lambda: attend(q, case.pool, table, q[:, :1, :6].int(), SMALL), r"blocks must be \[T, Hkv, K\]"),
        (
            lambda: select_blocks_paged(q, case.pool, table, SMALL, lse="fine"),
            "lse must be one of coarse, exact",
        ),
        (lambda: select_blocks_paged(q, case.pool, table, SMALL, search="x"), "search must be one of exact"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
