"""Blocks that the queries of a tile share, found and attended in Triton: against sets, and against the naive
attention."""

import pytest
import torch

from opensala.ops import sparse_attention
from tests.ops.grid import HAS_TRITON, TRITON_DEVICE, assert_close
from tests.ops.test_sparse import draw

if HAS_TRITON:
    from opensala.ops.sparse import triton, triton_attend, triton_band, triton_pairs
    from opensala.ops.sparse.triton_index import invert
    from opensala.ops.sparse.triton_rows import Rows, rows_of
    from opensala.ops.sparse.triton_shared import share

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]


def lists(positions, size, chosen, seed=0):
    """Lists `[T, 2, chosen]` of queries at these positions, in any order: half of them from a pool that
    drifts slowly, so that neighbours share them; the own block mostly; -1 for the rest."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.full((len(positions), 2, chosen), -1, dtype=torch.int32)
    for t, position in enumerate(positions):
        own = position // size
        for h in range(2):
            pool = torch.randperm(own + 1, generator=torch.Generator().manual_seed(t // 11 + 7 * h))
            free = torch.randperm(own + 1, generator=generator)
            wanted = dict.fromkeys(
                [own] * (t % 5 > 0) + pool[: chosen // 2].tolist() + free[: chosen // 3].tolist()
            )
            row = torch.tensor(list(wanted)[:chosen])
            out[t, h, torch.randperm(chosen, generator=generator)[: len(row)]] = row.int()
    return out


def expected(blocks, positions, size):
    """Of a tile: the past blocks that at least half of its queries list, with who lists them."""
    past = (positions[0] + 1) // size
    members: dict[int, int] = {}
    for i, row in enumerate(blocks.tolist()):
        for block in row:
            if 0 <= block < past:
                members[block] = members.get(block, 0) | 1 << i
    enough = (len(positions) + 1) // 2
    return {n: m for n, m in sorted(members.items()) if m.bit_count() >= enough}, past


def assert_shared(shared, tile, h, blocks, positions, size, page=lambda n: n):
    wanted, past = expected(blocks, positions, size)
    got = shared.limits[0, tile, h].tolist()
    assert got[0] == len(wanted) and got[2] == past
    count = got[0]
    assert shared.numbers[0, tile, h, :count].tolist() == [page(n) for n in wanted]
    members = [m & 0xFFFFFFFF for m in shared.members[0, tile, h, :count].tolist()]
    assert members == list(wanted.values())


@pytest.mark.parametrize("queries", [1, 8, 32])
def test_blocks_that_a_tile_shares(queries):
    size, tokens, length = 16, 75, 700
    positions = list(range(length - tokens, length))
    blocks = lists(positions, size, 12)
    shared = share(
        blocks[None].to(TRITON_DEVICE), size, Rows(tokens, length, length, None, None, None), 0, queries
    )
    assert shared.marks.shape[1] == -(-tokens // queries)
    for tile in range(shared.marks.shape[1]):
        part = slice(tile * queries, (tile + 1) * queries)
        for h in range(2):
            assert_shared(shared, tile, h, blocks[part, h], positions[part], size)
    if queries > 1:
        assert 0 < shared.limits[..., 0].sum() < sum(len(set(r)) for r in blocks.flatten(0, 1).tolist())


def test_blocks_that_tiles_of_pages_share():
    """Sequences of which one is dense; the numbers are pages."""
    size, cached, news = 16, [200, 40, 333], [13, 9, 21]
    cu = torch.tensor([0, *torch.tensor(news).cumsum(0)])
    pages = torch.randperm(90, generator=torch.Generator().manual_seed(3))[:75].view(3, 25).int()
    table = [cu, torch.tensor([a + b for a, b in zip(cached, news, strict=True)]), pages]
    cu_, lengths, pages_ = (x.int().to(TRITON_DEVICE) for x in table)
    positions = [list(range(a, a + b)) for a, b in zip(cached, news, strict=True)]
    blocks = torch.cat([lists(p, size, 9, seed) for seed, p in enumerate(positions)])
    sparse = torch.tensor([1, 0, 1], dtype=torch.int32, device=TRITON_DEVICE)
    rows = Rows(43, 90 * size, 0, lengths, cu_, None, pages_, sparse)
    shared = share(blocks[None].to(TRITON_DEVICE), size, rows, 0, 8)
    for n, (start, new) in enumerate(zip(cu.tolist(), news, strict=False)):
        for i in range(-(-new // 8)):
            tile, part = start // 8 + n + i, slice(8 * i, min(8 * i + 8, new))
            for h in range(2):
                if n == 1:
                    assert shared.limits[0, tile, h, 0] == 0
                else:
                    mine = blocks[start:][part, h]
                    assert_shared(
                        shared, tile, h, mine, positions[n][part], size, lambda b, n=n: int(pages[n, b])
                    )


@pytest.mark.parametrize(
    ("heads", "size", "part_bytes", "mark_bytes"),
    [(2, 16, 1, 1 << 26), (8, 24, 1 << 30, 1 << 26), (32, 16, 1, 1)],
    ids=["pairs in chunks", "at once", "all in chunks"],
)
def test_shared_blocks_and_pairs_make_the_whole(heads, size, part_bytes, mark_bytes, monkeypatch):
    """In the tiles of a GPU; both ways have work to do, and every block of a list goes one of them."""
    for module in (triton_attend, triton_band, triton_pairs):
        monkeypatch.setattr(module, "triton_interpreted", lambda: False)
    monkeypatch.setattr(triton, "shared_enough", lambda *_: True)
    monkeypatch.setattr(triton_pairs, "PART_BYTES", part_bytes)
    monkeypatch.setattr(triton_pairs, "MARK_BYTES", mark_bytes)
    q, k, v = draw(330, 70, heads, 2, 16)
    blocks = lists(list(range(260, 330)), size, 11)[None]
    args = [x.to(TRITON_DEVICE, torch.float16) for x in (q, k, v)]
    out = sparse_attention(*args, blocks.to(TRITON_DEVICE), size, backend="triton")
    assert_close(out, sparse_attention(q, k, v, blocks, size, backend="naive"), 4e-3)

    rows = rows_of(args[0], 330, None, None)
    shared = share(blocks.to(TRITON_DEVICE), size, rows, 0, 8)
    left = int(invert(blocks.to(TRITON_DEVICE), size, rows, 64, 0, shared).bounds[-1])
    assert 0 < left < int((blocks >= 0).sum()) // 2
