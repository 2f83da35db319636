"""Elements more than 2^32 apart, in memory that is reserved and for the most part never touched: what 32 bits
count wrongly on a GPU that holds a million tokens, the interpreter counts wrongly here."""

import mmap

import pytest
import torch
from torch import Tensor

from opensala.ops import (
    BlockSpec,
    KVPages,
    alibi_slopes,
    compress_keys,
    extend_compressed,
    lightning_attention_slots,
    norm_gate,
    paged_attention,
    select_blocks,
    silu_mul,
    sparse_attention,
    split_heads,
)
from tests.ops.grid import HAS_TRITON, INTERPRETED
from tests.ops.test_paged import Case

if HAS_TRITON:
    from opensala.ops.sparse import triton, triton_paged

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),  # a part without keys
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract"),  # rows that nobody reads
]
FRONT = 3 << 31  # elements before the first: offsets that wrapped around find zeros, and do not crash
NORESERVE = 0x4000  # Linux, of mmap; Python has no name for it
SPEC = BlockSpec(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=4)


def reserved(elements: int) -> Tensor:
    """Zeros in float32, of which a page of memory is taken when it is first written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, 4 * elements, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def far(x: Tensor, *dims: int) -> Tensor:
    """The values of x in float32, with first and last of each of `dims` at least 2^31 elements apart.

    A step itself fits 32 bits, so that a kernel gets it as such a number: only products with it do not.
    """
    strides, reach = list(x.contiguous().stride()), 0
    for d in dims:
        steps = x.shape[d] - 1
        assert steps > 1, "two places cannot be 2^31 apart with a step of less than that"
        strides[d] += (1 << 31) >> (steps.bit_length() - 1)
        reach += steps * strides[d]
    return reserved(FRONT + reach + x.numel()).as_strided(x.shape, strides, FRONT).copy_(x)


def attended(inputs, blocks, d_out):
    """Result and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = sparse_attention(*leaves, blocks, SPEC.block_size, backend="triton")
    out.backward(d_out)
    return out.detach(), *(x.grad for x in leaves)


def test_selection_and_attention(monkeypatch):
    """Rows, tokens and heads: which of them are far apart depends on how a long text lies."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, h, 16, generator=generator) for n, h in ((9, 6), (112, 3), (112, 3)))
    near, apart = (q, k, v), [far(x, 0, 1, 2) for x in (q, k, v)]
    blocks = select_blocks(q, k, SPEC, backend="triton")
    assert torch.equal(select_blocks(*apart[:2], SPEC, backend="triton"), blocks)
    levels = [compress_keys(k, *sizes, backend="triton") for sizes in ((8, 4), (32, 16))]
    windows = tuple(far(x, 0, 1, 2) for x in levels)
    assert torch.equal(select_blocks(q, k, SPEC, compressed=windows, backend="triton"), blocks)
    d_out = torch.randn(q.shape, generator=generator)
    wanted, got = attended(near, blocks, d_out), attended(apart, blocks, far(d_out, 0, 1, 2))
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, wanted, strict=True):
        assert torch.equal(a, b), name
    monkeypatch.setattr(triton, "shared_enough", lambda *_: True)
    results = [sparse_attention(*x, blocks, SPEC.block_size, backend="triton") for x in (near, apart)]
    assert torch.equal(*results), "by block"


def test_compressed_keys():
    k = torch.randn(3, 60, 3, 16, generator=torch.Generator().manual_seed(0))
    level = compress_keys(k, 8, 4, backend="triton")
    out = far(torch.zeros_like(level), 0, 1, 2)
    extend_compressed(far(k, 0, 1, 2), out, 0, k.shape[1], 8, 4, backend="triton")
    assert torch.equal(out, level)


class FarCase(Case):
    """A pool of more pages than 32 bits count elements of, and tokens that lie far apart."""

    def new_pool(self) -> KVPages:
        return KVPages(*(far(x, 0) for x in super().new_pool()))

    def packed(self, x, starts, ends):
        return far(super().packed(x, starts, ends), 0)


@pytest.mark.parametrize("by_page", [False, True])
def test_pages(by_page, monkeypatch):
    """A sequence that selects and one that does not."""
    monkeypatch.setattr(triton_paged, "shared_enough", lambda *_: by_page)
    results = []
    for kind in (Case, FarCase):
        case = kind(SPEC, [150, 45], sparse=[1, 0])
        results.append((*case.run([120, 20], "triton"), *case.pool))
    for name, a, b in zip(("blocks", "o", *KVPages._fields), *results, strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), name


def test_dense_pages():
    results = []
    for kind in (Case, FarCase):
        case = kind(SPEC, [70, 45], sparse=[0, 0])
        table = case.store([0, 0], case.lengths, case.pool, "triton")
        q = case.packed(case.q, [0, 0], case.lengths)
        results.append(paged_attention(q, case.pool, table, None, SPEC, backend="triton"))
    assert torch.equal(*results)


def test_states_in_slots():
    """The last of the slots that 17 GB hold, and its neighbour."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 16, generator=generator) for _ in range(3))
    state = torch.randn(2, 16, 16, generator=generator)
    cu, decay = torch.tensor([0, 3]).int(), torch.tensor(alibi_slopes(2))
    results = []
    for slots in (2, (1 << 32) // state.numel()):
        room = reserved(FRONT + slots * state.numel())
        states = room[FRONT:].view(slots, *state.shape)
        states[-1].copy_(state)
        places = {
            "read_slots": torch.tensor([slots - 1]).int(),
            "write_slots": torch.tensor([slots - 2]).int(),
        }
        o = lightning_attention_slots(q, k, v, decay, states, cu_seqlens=cu, **places, backend="triton")
        results.append((o, states[-2].clone()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_rows_of_a_wide_product():
    """Gates, and queries, keys and values, are columns of a product's result: its rows are far apart."""
    generator = torch.Generator().manual_seed(0)
    x, gate, weight = (torch.randn(*shape, generator=generator) for shape in ((9, 64), (9, 64), (64,)))
    wide, how = far(gate, 0), {"backend": "triton"}
    near = norm_gate(x, weight, gate, 1e-6, **how), silu_mul(gate, x, **how)
    apart = norm_gate(x, weight, wide, 1e-6, **how), silu_mul(wide, far(x, 0), **how)
    near += split_heads(gate[None], 2, 1, None, None, None, None, 1e-6, **how)
    apart += split_heads(wide[None], 2, 1, None, None, None, None, 1e-6, **how)
    for a, b in zip(near, apart, strict=True):
        assert torch.equal(a, b)
