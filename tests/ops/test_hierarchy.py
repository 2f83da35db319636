"""Hierarchical selection against its reference implementation, and what it may and may not miss."""

import pytest
import torch

from opensala.ops import BlockSpec, select_blocks

# A region is 16 blocks: 64 tokens here, so that a few hundred tokens have several.
FINE = BlockSpec(kernel_size=4, kernel_stride=2, block_size=4, init_blocks=1, window_size=8, topk=4)
COARSER = FINE._replace(kernel_stride=4, kernel_size=8, block_size=8)


def draw(length, tokens, heads, kv_heads, dim):
    generator = torch.Generator().manual_seed(length + tokens + dim)
    q = 3 * torch.randn(1, tokens, heads, dim, generator=generator, dtype=torch.float64)
    return q, torch.randn(1, length, kv_heads, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("spec", [FINE, COARSER], ids=["fine", "coarser"])
@pytest.mark.parametrize(
    ("length", "tokens", "heads", "kv_heads", "dim", "regions"),
    [
        (600, 40, 4, 2, 16, 3),
        (700, 200, 3, 1, 20, 4),
        (2000, 60, 1, 1, 64, 5),
        (333, 333, 2, 1, 8, 2),
    ],
)
def test_the_fast_forms_follow_the_plain_statement(length, tokens, heads, kv_heads, dim, regions, spec):
    q, k = draw(length, tokens, heads, kv_heads, dim)
    wanted = select_blocks(q, k, spec, search="hierarchical", regions=regions, backend="naive")
    for backend, dtype in (("torch", torch.float64), ("torch", torch.float32), ("cpp", torch.float32)):
        got = select_blocks(
            q.to(dtype), k.to(dtype), spec, search="hierarchical", regions=regions, backend=backend
        )
        different = (got != wanted).any(-1)
        # Blocks that share a window tie exactly; a rounding anywhere in the row can turn such a tie.
        assert different.double().mean() <= 0.03, (
            f"{backend} {dtype}: {different.double().mean():.3f} of the rows differ"
        )
        shared = (got[..., None] == wanted[..., None, :]).any(-1).sum(-1)[different]
        assert (shared >= spec.num_blocks - 1).all()


@pytest.mark.parametrize("backend", ["naive", "torch", "cpp"])
def test_with_room_for_all_regions_it_is_exact_selection_of_one_head(backend):
    # With one head the softmax denominator does not change the order, so nothing but the regions can
    # make a difference.
    q, k = draw(500, 100, 1, 1, 16)
    assert torch.equal(
        select_blocks(q, k, FINE, search="hierarchical", regions=64, backend="naive"),
        select_blocks(q, k, FINE),
    )
    q, k = q.float(), k.float()
    same = select_blocks(q, k, FINE, search="hierarchical", regions=64, backend=backend) == select_blocks(
        q, k, FINE
    )
    assert same.all(-1).double().mean() >= 0.98


def test_forced_blocks_and_what_is_near_are_always_taken():
    q, k = draw(1500, 1500, 2, 1, 16)
    blocks = select_blocks(q.float(), k.float(), FINE, search="hierarchical", regions=2)[0, :, 0]
    for t in (0, 3, 70, 555, 1499):
        chosen, own = set(blocks[t].tolist()) - {-1}, t // 4
        assert {0, *range(max(0, own - 2), own + 1)} <= chosen and max(chosen) == own
        assert len(chosen) == min(FINE.num_blocks, own + 1)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_single_outlying_key_far_away_is_found(backend):
    """The mean of its region says nothing of it: this is what the bound is for."""
    q, k = draw(4000, 16, 2, 1, 32)
    k[0, 1000:1004, 0] += 4 * q[0, 15, 0] / q[0, 15, 0].norm() * k.shape[-1] ** 0.5
    blocks = select_blocks(q.float(), k.float(), FINE, search="hierarchical", regions=4, backend=backend)
    assert 250 in blocks[0, 15, 0].tolist()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_choice_does_not_depend_on_how_a_prompt_is_cut(backend):
    q, k = (x.float() for x in draw(900, 900, 2, 1, 16))
    whole = select_blocks(q, k, FINE, search="hierarchical", regions=3, backend=backend)
    parts = [
        select_blocks(q[:, a:b], k[:, :b], FINE, search="hierarchical", regions=3, backend=backend)
        for a, b in ((0, 300), (300, 301), (301, 900))
    ]
    assert (torch.cat(parts, 1) == whole).all(-1).float().mean() >= 0.995
