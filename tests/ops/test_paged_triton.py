"""The Triton forms of the ops over pages against the reference implementation, on small shapes."""

import pytest
import torch

from opensala.ops import (
    BlockSpec,
    KVPages,
    PageTable,
    compress_keys,
    exact_ties,
    paged_attention,
    select_blocks_paged,
    store_kv,
)
from tests.ops.grid import HAS_TRITON, TRITON_DEVICE, assert_close, nothing_waits
from tests.ops.test_paged import SMALL, SPECS, Case, alone
from tests.ops.test_sparse_triton import assert_best

if HAS_TRITON:
    from opensala.ops.sparse import (
        triton_attend,
        triton_band,
        triton_paged,
        triton_pairs,
        triton_select,
        triton_top,
    )

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    # a part without keys: -inf is meant
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
    # rows of dense sequences, which no part of a query has: made, and then written by another kernel
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract"),
]


class DeviceCase(Case):
    """A case whose pool and tables lie where the kernels run; its lists of q, k, v stay on the CPU."""

    def new_pool(self) -> KVPages:
        return KVPages(*(x.to(TRITON_DEVICE) for x in super().new_pool()))

    def table(self, starts, ends):
        return type(super().table(starts, ends))(*(x.to(TRITON_DEVICE) for x in super().table(starts, ends)))

    def packed(self, x, starts, ends):
        return super().packed(x, starts, ends).to(TRITON_DEVICE)

    def stored(self, n):
        return tuple(x.cpu() for x in super().stored(n))


def cuts_of(lengths):
    """Calls that bring each sequence to its length: a first token, some tokens, one token, none, the rest."""
    ends = [[min(n, m) for n in lengths] for m in (1, 37, 38, 38)]
    return [[0] * len(lengths), *ends, lengths]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_pages_hold_every_window_that_ends_in_them_and_nothing_else(spec):
    lengths = [3 * spec.block_size + 5, spec.kernel_size - 1, spec.coarse_size, spec.coarse_size + 40]
    case = DeviceCase(spec, lengths, (4, 2, 20, 12))
    cuts = cuts_of(lengths)
    for starts, ends in zip(cuts, cuts[1:], strict=False):
        case.store(starts, ends, case.pool, "triton")
    filled = [0] * 4
    for n in range(4):
        keys, values, *levels = case.stored(n)
        assert torch.equal(keys, case.k[n]) and torch.equal(values, case.v[n])
        for level, sizes in zip(levels, [spec[:2], (spec.coarse_size, spec.coarse_stride)], strict=True):
            wanted = compress_keys(case.k[n].double()[None], *sizes, backend="naive")[0]
            assert_close(level, wanted, 1e-6)  # sums of up to 160 numbers of order one
        filled = [f + len(x) for f, x in zip(filled, (keys, values, *levels), strict=True)]
    assert [int((~x.isnan()).any(-1).any(-1).sum()) for x in case.pool] == filled


@pytest.mark.parametrize("pool_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_pools_hold_means_of_rounded_keys(pool_dtype):
    case = DeviceCase(SMALL, [60, 33], (2, 1, 32, 32), pool_dtype=pool_dtype)
    for starts, ends in (([0, 0], [37, 5]), ([37, 5], case.lengths)):
        case.store(starts, ends, case.pool, "triton")
    for n, k in enumerate(case.k):
        keys, values, *levels = case.stored(n)
        assert torch.equal(keys, k.to(pool_dtype)) and torch.equal(values, case.v[n].to(pool_dtype))
        for level, sizes in zip(levels, [SMALL[:2], (SMALL.coarse_size, SMALL.coarse_stride)], strict=True):
            mean = compress_keys(keys.double()[None], *sizes, backend="naive")[0]
            ulp = 2.0 ** (-11 if pool_dtype == torch.float16 else -8)
            assert ((level.double() - mean).abs() <= 1.01 * ulp * mean.abs() + 1e-7).all()  # rounded once


def test_a_window_has_the_same_bits_however_its_tokens_came():
    case = DeviceCase(SPECS["released"], [200, 130])
    pools = [case.new_pool(), case.new_pool()]
    case.store([0, 0], case.lengths, pools[0], "triton")
    cuts = [[0, 0], [63, 1], [64, 127], [190, 128], case.lengths]
    for starts, ends in zip(cuts, cuts[1:], strict=False):
        case.store(starts, ends, pools[1], "triton")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*pools, strict=True))


# Lengths and cached tokens: in decoding, some of them with a draft, around ends of blocks and of what lists
# hold, one sequence without new tokens; in a prefill, beside decoding, in chunks, from nothing.
DECODING = ([1, 16, 17, 96, 97, 260, 130], [0, 15, 16, 93, 96, 259, 130])
PREFILL = ([20, 110, 130, 1, 64, 33], [0, 85, 112, 0, 63, 33])
CALLS = {"decoding": DECODING, "prefill": PREFILL}
HEADS = [(2, 2, 32, 32), (4, 2, 64, 20), (16, 1, 60, 64)]  # groups of 1, 2 and 16


def filled(spec, call, heads, **more):
    """A case with everything stored, the table of its last call, and the queries of that."""
    lengths, cached = call
    case = DeviceCase(spec, lengths, heads, **more)
    case.store([0] * len(lengths), lengths, case.pool, "torch")
    return case, case.table(cached, lengths), case.packed(case.q, cached, lengths)


def assert_attends(call, case, table, q, tolerance=2e-5):
    lists, wanted = alone(case, call[1], "naive")  # of both: where blocks tie, devices choose differently
    blocks = torch.cat(lists)
    blocks[(blocks < 0).all(-1).all(-1)] = 1 << 30  # rows of dense sequences may hold anything
    out = paged_attention(q, case.pool, table, blocks.to(q.device), case.spec, backend="triton")
    assert out.dtype == q.dtype
    assert_close(out, torch.cat(wanted).double(), tolerance)


@pytest.fixture(params=["one program for a list", "several"])
def splits(request, monkeypatch):
    """As on a GPU with idle multiprocessors: programs share a list or the blocks of a dense sequence."""
    monkeypatch.setattr(triton_paged, "cores", lambda _: 1 if request.param.startswith("one") else 16)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_equals_naive(heads, call, splits):
    assert_attends(call, *filled(SMALL, call, heads))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_attention_over_pages_of_any_size(spec, call):
    size = spec.block_size
    scaled = tuple([n * size // 16 for n in x] for x in ([5, 20, 130, 97], [4, 19, 129, 95]))
    call = scaled if call is DECODING else call
    assert_attends(call, *filled(spec, call, (2, 1, 16, 12)))


@pytest.mark.parametrize("name", ["96 tokens a block", "released", "small"])
@pytest.mark.parametrize("call", [([130, 97], [129, 95]), ([300, 230], [297, 190])], ids=CALLS)
def test_attention_in_tiles_of_a_gpu(name, call, monkeypatch):
    for module in (triton_attend, triton_band, triton_pairs):
        monkeypatch.setattr(module, "triton_interpreted", lambda: False)
    assert_attends(call, *filled(SPECS[name], call, (2, 1, 32, 32)))


@pytest.fixture
def by_page(monkeypatch):
    """Sends every call with lists to the kernels that go page by page, in chunks of 64 queries."""
    monkeypatch.setattr(triton_paged, "shared_enough", lambda *_: True)
    monkeypatch.setattr(triton_pairs, "PART_BYTES", 1)
    monkeypatch.setattr(triton_pairs, "MARK_BYTES", 1)


@pytest.mark.parametrize(
    ("heads", "call"),
    [
        (HEADS[0], PREFILL),
        (HEADS[1], ([190, 20, 113], [118, 17, 110])),  # 72 queries of the first: two chunks
        (HEADS[2], ([120, 20, 113], [113, 17, 110])),
    ],
    ids=str,
)
def test_attention_page_by_page_equals_naive(heads, call, by_page):
    assert_attends(call, *filled(SMALL, call, heads, sparse=[1, 0, 1, 1, 1, 0][: len(call[0])]))


@pytest.mark.parametrize("name", ["96 tokens a block", "nothing a power of two", "released"])
def test_attention_page_by_page_in_tiles_of_a_gpu(name, by_page, monkeypatch):
    for module in (triton_attend, triton_band, triton_pairs):
        monkeypatch.setattr(module, "triton_interpreted", lambda: False)
    call = ([130, 97, 200], [119, 90, 192])
    assert_attends(call, *filled(SPECS[name], call, (2, 1, 32, 20), sparse=[1, 0, 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_page_by_page_over_a_half_pool(dtype, by_page):
    case, table, q = filled(SMALL, PREFILL, (4, 2, 32, 32), pool_dtype=torch.float16)
    case.q = [x.to(dtype).float() for x in case.q]
    assert_attends(PREFILL, case, table, q.to(dtype), 3e-3 if dtype == torch.float16 else 2e-5)


def test_a_page_that_sequences_share_is_read_for_all(by_page):
    """Two continuations of a common beginning, the full pages of which lie in the pool only once."""
    call = ([150, 130], [128, 112])
    case = DeviceCase(SMALL, call[0], (2, 1, 32, 32), sparse=[1, 1])
    for x in (case.k, case.v):
        x[1][:112] = x[0][:112]
    case.pages[1, :7] = case.pages[0, :7]
    case.store([0, 0], [112, 0], case.pool, "torch")
    case.store([112, 112], call[0], case.pool, "torch")
    assert_attends(call, case, case.table(call[1], call[0]), case.packed(case.q, call[1], call[0]))


def test_long_sparse_calls_go_page_by_page():
    def asked(tokens, sequences, length, dim=128):
        q = torch.empty(tokens, 32, dim, dtype=torch.bfloat16, device="meta")
        kv = torch.empty(1 << 15, 64, 2, dim, dtype=torch.bfloat16, device="meta")
        ints = [torch.empty(n, dtype=torch.int32) for n in (sequences + 1, sequences, sequences)]
        table = PageTable(*ints[:2], torch.empty(sequences, length // 64, dtype=torch.int32), ints[2])
        blocks = torch.empty(tokens, 2, 96, dtype=torch.int32, device="meta")
        return triton_paged._shared_enough(q, KVPages(kv, kv, kv, kv), table, blocks, BlockSpec())

    assert asked(4096, 1, 1 << 20) and asked(4096 + 32, 33, 1 << 17) and asked(200, 1, 8192)
    assert not asked(64, 64, 8192) and not asked(256, 200, 8192) and not asked(200, 1, 1 << 20)
    assert not asked(4096, 1, 1 << 20, 512)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_blocks_all_are_dense(call, splits):
    case, table, q = filled(SMALL, call, (4, 2, 32, 20), sparse=[1] * len(call[0]))
    out = paged_attention(q, case.pool, table, None, SMALL, backend="triton")
    case.sparse = [0] * len(call[0])
    assert_close(out, torch.cat(alone(case, call[1], "naive")[1]).double(), 2e-5)


@pytest.mark.parametrize(
    ("dtype", "pool_dtype", "tolerance"),
    # rounding of weights and results to float16 (2^-11); in float32 only the order of sums differs
    [(torch.float16, torch.float16, 3e-3), (torch.float32, torch.bfloat16, 2e-5)],
    ids=str,
)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_attention_over_half_pools(call, dtype, pool_dtype, tolerance):
    case, table, q = filled(SMALL, call, (4, 2, 32, 32), pool_dtype=pool_dtype)
    case.q = [x.to(dtype).float() for x in case.q]
    assert_attends(call, case, table, q.to(dtype), tolerance)


def assert_selects(call, case, table, q, lse="coarse"):
    """The best blocks in every row of a sparse sequence, up to near-ties; -1 in those of dense ones."""
    blocks = select_blocks_paged(q, case.pool, table, case.spec, lse=lse, backend="triton").cpu()
    bounds, cached = table.cu_seqlens.tolist(), call[1]
    for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if not case.sparse[n]:
            assert (blocks[a:b] == -1).all()
            continue
        queries, keys = case.q[n][cached[n] :].double(), case.k[n].double()
        assert_best(blocks[None, a:b], queries[None], keys[None], case.spec, lse)


# Around the first query that chooses, the first windows, and far behind them.
CHOOSING = ([1, 97, 260, 113, 33, 150], [0, 95, 259, 110, 33, 149])
READING = ([112, 20, 180, 150], [90, 0, 158, 149])


@pytest.fixture(params=["few programs", "many"])
def shares(request, monkeypatch):
    """As on a GPU with idle multiprocessors: several programs share a denominator and a row of scores."""
    monkeypatch.setattr(triton_select, "cores", lambda _: 1 if request.param.startswith("few") else 16)


@pytest.mark.parametrize("call", [CHOOSING, READING], ids=["decoding", "prefill"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_selection_takes_the_best_blocks(heads, call, shares):
    assert_selects(call, *filled(SMALL, call, heads, sparse=[1, 0, 1, 1, 1, 1][: len(call[0])]))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_selection_for_any_spec(spec):
    room = spec.block_size * spec.num_blocks
    call = ([room + 2, room + 3 * spec.block_size, 2 * room + spec.coarse_size], [room - 1, room, 2 * room])
    call[1][2] = call[0][2] - 2
    call[1][1] = call[0][1] - 1
    assert_selects(call, *filled(spec, call, (2, 1, 20, 16), sparse=[1, 0, 1]))


@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_selection_with_denominators_that_differ_much(lse, shares):
    call = ([700, 330], [698, 326])
    case, table, q = filled(SMALL, call, (4, 1, 32, 32), sparse=[1, 1])
    case.q = [20 * x for x in case.q]
    assert_selects(call, case, table, 20 * q, lse)


def test_selection_before_the_second_level_begins():
    """Queries that must choose while no window of the second level has ended: the first serves."""
    spec = SPECS["windows wider than a block"]
    call = ([160, 163], [148, 155])
    case, table, q = filled(spec, call, (16, 1, 16, 16), sparse=[1, 1])
    case.q = [40 * x for x in case.q]  # denominators that differ much from head to head
    assert_selects(call, case, table, 40 * q)


def test_selection_with_ties_as_the_reference_decides_them():
    call = ([300, 150, 330], [245, 140, 300])
    case, table, q = filled(SMALL, call, (2, 1, 16, 16), sparse=[1, 0, 1])
    wanted = torch.cat(alone(case, call[1], "naive")[0])
    with exact_ties():
        got = select_blocks_paged(q, case.pool, table, SMALL, backend="triton").cpu()
    sparse = torch.ones(len(q), dtype=torch.bool)
    sparse[55:65] = False
    assert torch.equal(got[sparse], wanted[sparse]) and (got[~sparse] == -1).all()


def test_selection_in_chunks_and_long_rows(monkeypatch):
    """Scores of 64 queries at once, rows of which pass through registers in pieces."""
    monkeypatch.setattr(triton_select, "SCRATCH", 1)
    monkeypatch.setattr(triton_top, "WIDEST", 16)
    call = ([300, 40, 330], [245, 28, 300])
    assert_selects(call, *filled(SMALL, call, (2, 1, 16, 16), sparse=[1, 0, 1]))


def test_hierarchical_search_says_that_it_has_no_triton_form():
    case, table, q = filled(SMALL, ([40], [39]), (2, 1, 16, 16))
    with pytest.raises(ValueError, match="hierarchical search has no Triton form"):
        select_blocks_paged(q, case.pool, table, SMALL, search="hierarchical", backend="triton")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_whole_chain_equals_naive(call):
    """Stored, selected and attended by Triton; selection may differ from the reference where blocks tie."""
    case = DeviceCase(SMALL, call[0], (4, 2, 32, 20))
    blocks, out = case.run(call[1], "triton")
    chosen, outputs = alone(case, call[1], "naive")
    same = (blocks.cpu() == torch.cat(chosen)).all(-1).all(-1)
    assert same.double().mean() > 0.9
    assert_close(out.cpu()[same], torch.cat(outputs)[same].double(), 2e-5)


@pytest.mark.parametrize("pages_at_once", [False, True], ids=["by query", "by page"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_waits_for_the_device(call, pages_at_once, monkeypatch):
    monkeypatch.setattr(triton_paged, "shared_enough", lambda *_: pages_at_once)
    case, table, q = filled(SMALL, call, (4, 2, 32, 20))
    k, v = (case.packed(x, call[1], call[0]) for x in (case.k, case.v))
    with nothing_waits():
        store_kv(k, v, case.pool, table, SMALL, backend="triton")
        blocks = select_blocks_paged(q, case.pool, table, SMALL, backend="triton")
        paged_attention(q, case.pool, table, blocks, SMALL, backend="triton")
        paged_attention(q, case.pool, table, None, SMALL, backend="triton")


def test_a_call_without_new_tokens():
    call = ([40, 20], [40, 20])
    case, table, q = filled(SMALL, call, (2, 1, 16, 16))
    store_kv(q[:, :1], q[:, :1], case.pool, table, SMALL, backend="triton")
    blocks = select_blocks_paged(q, case.pool, table, SMALL, backend="triton")
    assert blocks.shape == (0, 1, SMALL.num_blocks)
    assert paged_attention(q, case.pool, table, blocks, SMALL, backend="triton").shape == (0, 2, 16)
