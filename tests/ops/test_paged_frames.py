"""A pool that holds what was chosen and nothing else, of a sequence that has more pages than the pool."""

import pytest
import torch

from opensala.ops import KVPages, paged_attention, select_blocks_paged
from tests.ops.test_paged import SMALL, Case

TRITON = pytest.param("triton", marks=pytest.mark.triton)


@pytest.mark.parametrize("backend", ["cpp", "torch", TRITON])
@pytest.mark.parametrize("by_page", [False, True])
def test_frames_of_the_chosen_blocks_are_enough(backend, by_page, monkeypatch):
    if backend == "triton":
        triton_paged = pytest.importorskip("opensala.ops.sparse.triton_paged")
        monkeypatch.setattr(triton_paged, "_shared_enough", lambda *_: by_page)
    elif by_page:
        pytest.skip("a form of Triton's")
    case = Case(SMALL, [300 * SMALL.block_size + 3, 40 * SMALL.block_size], (4, 2, 16, 16), sparse=[1, 1])
    starts = [n - 6 for n in case.lengths]
    case.store([0, 0], case.lengths, case.pool, "cpp")
    table, q = case.table(starts, case.lengths), case.packed(case.q, starts, case.lengths)
    blocks = select_blocks_paged(q, case.pool, table, SMALL, backend="cpp")
    wanted = paged_attention(q, case.pool, table, blocks, SMALL, backend=backend)
    pages, frames, chosen = table.pages.clone(), torch.full_like(table.pages, -1), []
    for n, some in enumerate(blocks.split(6)):
        listed = some[some >= 0].unique().long()
        frames[n, listed] = torch.arange(len(chosen), len(chosen) + len(listed), dtype=torch.int32)
        chosen += pages[n, listed].tolist()
    assert len(chosen) < 60, "fewer frames than the longer sequence has pages"
    few = KVPages(*(x[chosen].contiguous() for x in case.pool))
    found = paged_attention(q, few, table._replace(pages=frames), blocks, SMALL, backend=backend)
    assert torch.equal(found, wanted)
