"""Attention over all keys against the written-out softmax, with gradients, on the backends it has."""

import pytest
import torch

from opensala.ops import dense_attention
from tests.ops.grid import BACKENDS, assert_close

CPU = [b for b in BACKENDS if b.id != "triton"]


def draw(batch, tokens, length, heads, kv_heads, dim=20, value_dim=12):
    g = torch.Generator().manual_seed(length)
    shapes = (tokens, heads, dim), (length, kv_heads, dim), (length, kv_heads, value_dim)
    return [torch.randn(batch, *shape, generator=g, dtype=torch.float64) for shape in shapes]


def written_out(q, k, v, scale):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,blhd->bhtl", q, k) * scale
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    return torch.einsum("bhtl,blhd->bthd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)


def gradients(run, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = run(*leaves)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, noise.to(out.dtype))]


@pytest.mark.parametrize(
    "sizes", [(2, 1, 1, 1, 1), (3, 70, 70, 6, 2), (1, 513, 513, 3, 3), (2, 9, 200, 4, 1), (1, 130, 131, 2, 2)]
)
@pytest.mark.parametrize("backend", CPU)
def test_attention_and_gradients(backend, sizes):
    inputs = draw(*sizes)
    wanted = gradients(lambda *x: written_out(*x, 0.3), *inputs)
    backend.compare(
        lambda *x: gradients(lambda *y: dense_attention(*y, 0.3, backend=backend.name), *x), wanted, *inputs
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_16_bits_are_rounded_once(dtype, tolerance):
    """Strided as projections leave them, too: keys and values side by side in one tensor."""
    q, k, v = (x.to(dtype) for x in draw(2, 100, 100, 4, 2, 16, 16))
    both = torch.stack([k, v], 3)
    halves = both[:, :, :, 0], both[:, :, :, 1]
    got = gradients(lambda q, k, v: dense_attention(q, k, v, 0.25, backend="cpp"), q, *halves)
    wanted = gradients(lambda *x: written_out(*x, 0.25), *(x.double() for x in (q, k, v)))
    assert {x.dtype for x in got} == {dtype}
    assert_close(got[0], wanted[0], tolerance)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert_close(a, b, 2 * tolerance)  # what comes in is rounded too
