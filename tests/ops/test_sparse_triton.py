"""The Triton forms of compression, selection and block-sparse attention against the plain statements, on small shapes."""

import math

import pytest
import torch

from opensala.ops import BlockSpec, compress_keys, select_blocks, sparse_attention
from opensala.ops.sparse.naive import naive_block_scores, naive_compress_keys
from tests.ops.grid import HAS_TRITON, TRITON_DEVICE
from tests.ops.test_sparse import SMALL, draw, gradients

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")]
SHAPES = [(220, 30, 4, 2, 16), (150, 120, 2, 2, 16), (300, 9, 8, 1, 60), (260, 1, 3, 1, 64), (200, 21, 16, 1, 16)]


def on_device(*tensors):
    return [x.to(TRITON_DEVICE, torch.float32 if x.is_floating_point() else x.dtype) for x in tensors]


def assert_best(blocks, q, k, spec: BlockSpec):
    """Every row holds the best blocks by the float64 scores, up to near-ties: ascending, padded with -1, none twice."""
    scale = 1 / math.sqrt(q.shape[-1])
    for b in range(q.shape[0]):
        k1 = naive_compress_keys(k[b], spec.kernel_size, spec.kernel_stride)
        k2 = naive_compress_keys(k[b], spec.coarse_size, spec.coarse_stride)
        for t in range(q.shape[1]):
            position = k.shape[1] - q.shape[1] + t
            scores = naive_block_scores(q[b, t], k1, k2, spec, position, scale, "coarse")
            for h in range(k.shape[2]):
                row = blocks[b, t, h].tolist()
                count = min(spec.num_blocks, scores.shape[1])
                chosen = row[:count]
                assert row[count:] == [-1] * (spec.num_blocks - count) and chosen == sorted(set(chosen)) and chosen[0] >= 0
                worst, rest = scores[h, chosen].min(), [x for n, x in enumerate(scores[h].tolist()) if n not in chosen]
                assert max(rest, default=-math.inf) <= worst * (1 + 1e-5), (t, h)


@pytest.mark.parametrize(("length", "tokens", "heads", "kv_heads", "dim"), SHAPES, ids=str)
def test_selection_takes_the_best_blocks(length, tokens, heads, kv_heads, dim):
    q, k, _ = draw(length, tokens, heads, kv_heads, dim)
    assert_best(select_blocks(*on_device(q, k), SMALL, backend="triton").cpu(), q, k, SMALL)


def test_of_blocks_that_tie_exactly_the_lower_is_taken():
    q, _, _ = draw(300, 4, 2, 1, 16)
    k = torch.ones(1, 300, 1, 16, dtype=torch.float64)
    q, k = on_device(q, k)
    own = 299 // 16
    forced = [0, 1, own - 2, own - 1, own]
    wanted = sorted([*forced, *range(2, 2 + SMALL.num_blocks - len(forced))])
    assert select_blocks(q, k, SMALL, backend="triton")[0, 3, 0].tolist() == wanted


@pytest.mark.parametrize(("length", "tokens", "heads", "kv_heads", "dim"), SHAPES, ids=str)
def test_attention_and_gradients_equal_naive(length, tokens, heads, kv_heads, dim):
    q, k, v = draw(length, tokens, heads, kv_heads, dim)
    blocks = select_blocks(q, k, SMALL)
    wanted = gradients("naive", q, k, v, blocks, SMALL)
    got = gradients("triton", *on_device(q, k, v, blocks), SMALL)
    for a, b in zip(got, wanted, strict=True):
        assert (a.cpu() - b).abs().max() / b.abs().max().clamp(min=1) < 2e-5


def test_packed_documents_equal_naive():
    q, k, v = draw(150, 150, 2, 1, 16)
    cu = torch.tensor([0, 3, 50, 150])
    blocks = select_blocks(q, k, SMALL, cu_seqlens=cu)
    wanted = gradients("naive", q, k, v, blocks, SMALL, cu)
    got = gradients("triton", *on_device(q, k, v, blocks), SMALL, cu.to(TRITON_DEVICE))
    for a, b in zip(got, wanted, strict=True):
        assert (a.cpu() - b).abs().max() / b.abs().max().clamp(min=1) < 2e-5
    chosen = select_blocks(*on_device(q, k), SMALL, cu_seqlens=cu.to(TRITON_DEVICE), backend="triton").cpu()
    for a, b in ((0, 3), (3, 50), (50, 150)):
        assert_best(chosen[:, a:b], q[:, a:b], k[:, a:b], SMALL)


def test_rows_of_different_lengths_do_not_see_unused_room():
    q, k, v = draw(240, 2, 2, 1, 16, batch=2)
    lengths = torch.tensor([240, 170])
    k[1, 170:] = v[1, 170:] = float("nan")
    args, there = on_device(q, k, v), lengths.to(TRITON_DEVICE)
    blocks = select_blocks(*args[:2], SMALL, lengths=there, backend="triton")
    out = sparse_attention(*args, blocks, 16, lengths=there, backend="triton").cpu()
    for row, n in enumerate(lengths.tolist()):
        alone = (q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n])
        assert_best(blocks[row : row + 1].cpu(), *alone[:2], SMALL)
        wanted = sparse_attention(*alone, blocks[row : row + 1].cpu(), 16, backend="naive")
        assert (out[row : row + 1] - wanted).abs().max() < 2e-5


def test_compression_equals_naive():
    _, k, _ = draw(100, 1)
    for size, stride in ((8, 4), (32, 16)):
        got = compress_keys(*on_device(k), size, stride, backend="triton").cpu()
        assert (got - compress_keys(k, size, stride, backend="naive")).abs().max() < 1e-6
