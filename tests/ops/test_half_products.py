"""Attention and selection with products in bfloat16: near what float32 gives, where there are any."""

import pytest
import torch

from opensala.ops import BlockSpec, paged_attention, select_blocks_paged
from opensala.ops.native.processor import processor_features
from tests.ops.grid import assert_close
from tests.ops.test_paged import SMALL, SPECS, Case, mixed

HAS_PAIRS = "avx512_bf16" in processor_features()
# query heads, kv heads, D, Dv: whole vectors, rows of pairs with a rest, values with a rest
HEADS = [(4, 2, 64, 64), (2, 2, 44, 20), (16, 1, 32, 48)]


def both(case: Case, cached: list[int], spec: BlockSpec) -> list[torch.Tensor]:
    """Blocks and outputs in float32, then with products in bfloat16, of the same blocks."""
    blocks, out = case.run(cached, "cpp")
    table, q = case.table(cached, case.lengths), case.packed(case.q, cached, case.lengths)
    chosen = select_blocks_paged(q, case.pool, table, spec, half_products=True)
    half = paged_attention(q, case.pool, table, blocks, spec, half_products=True)
    return [blocks, out, chosen, half]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_they_differ_by_rounding_and_no_more(spec, heads):
    lengths, cached = mixed(spec)
    case = Case(spec, lengths, heads, pool_dtype=torch.bfloat16)
    blocks, out, chosen, half = both(case, cached, spec)
    assert_close(half, out.double(), 0.02)
    assert torch.equal(half, out) == (not HAS_PAIRS)
    kept = (blocks[..., None] == chosen[..., None, :]).any(-1)[blocks >= 0]
    assert kept.double().mean() > 0.97 and (HAS_PAIRS or kept.all())


def test_rounding_does_not_grow_with_the_length():
    """Against float64 over the same rounded keys and values, behind many blocks that are all attended to."""
    spec = SMALL._replace(topk=60)
    errors = []
    for length in (200, 900):
        case = Case(spec, [length], (4, 2, 64, 64), pool_dtype=torch.bfloat16, sparse=[0])
        *_, half = both(case, [0], spec)
        exact = Case(spec, [length], (4, 2, 64, 64), torch.float64, sparse=[0])
        exact.k, exact.v = ([x.bfloat16().double() for x in y] for y in (exact.k, exact.v))
        errors.append((half[-64:].double() - exact.run([0], "naive")[1][-64:]).abs().max().item())
    assert max(errors) < 0.02 and errors[1] < 2 * errors[0] + 1e-3


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_single_tokens_and_other_pools_keep_their_bits(pool_dtype):
    lengths = [300, 90, 17] if pool_dtype == torch.bfloat16 else [300, 200]
    cached = [n - 1 for n in lengths] if pool_dtype == torch.bfloat16 else [0, 150]
    case = Case(SMALL, lengths, (4, 2, 32, 32), pool_dtype=pool_dtype)
    blocks, out, chosen, half = both(case, cached, SMALL)
    assert torch.equal(blocks, chosen) and torch.equal(out, half)


@pytest.mark.skipif(not HAS_PAIRS, reason="products of bfloat16 are not faster on this processor")
def test_a_row_depends_on_no_other():
    case = Case(SMALL, [700, 333], (4, 2, 64, 64), pool_dtype=torch.bfloat16, sparse=[1, 0])
    *_, wanted = both(case, [0, 0], SMALL)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    table = case.table([500, 333], case.lengths)
    q = case.packed(case.q, [500, 333], case.lengths)
    blocks = select_blocks_paged(q, case.pool, table, SMALL)
    found = paged_attention(q, case.pool, table, blocks, SMALL, half_products=True)
    torch.set_num_threads(before)
    assert torch.equal(found, wanted[500:700])
