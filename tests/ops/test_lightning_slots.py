"""Lightning attention over slots: right, in place, and the same bits however a sequence was cut or in what
company."""

import random

import pytest
import torch

from opensala.ops import alibi_slopes, lightning_attention, lightning_attention_slots

# float32 sums of some hundred products of order 1, in another order; float64 almost exact
TOLERANCE = {torch.float32: {"atol": 2e-4, "rtol": 2e-4}, torch.float64: {"atol": 1e-10, "rtol": 1e-10}}
SHAPES = [(4, 32, 32), (2, 64, 64), (3, 60, 60), (1, 8, 20), (5, 7, 5), (2, 16, 128)]


def inputs(tokens, heads, dim, value_dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, tokens, heads, dim, generator=generator, dtype=dtype)
    return q, k, torch.randn(tokens, heads, value_dim, generator=generator, dtype=dtype)


def run(q, k, v, states, bounds, read, write, backend="cpp"):
    decay = torch.tensor(alibi_slopes(q.shape[1]), dtype=torch.float32)
    places = {"read_slots": read, "write_slots": write, "cu_seqlens": bounds}
    places = {name: torch.tensor(x, dtype=torch.int32) for name, x in places.items()}
    return lightning_attention_slots(q, k, v, decay, states, scale=0.3, backend=backend, **places)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpp", torch.float32), ("torch", torch.float32), ("torch", torch.float64), ("naive", torch.float64)],
)
def test_every_form_equals_whole_sequences_in_float64(shape, backend, dtype):
    lengths, heads = (1, 130, 64, 17), shape[0]
    q, k, v = inputs(sum(lengths), *shape, dtype=dtype)
    states = torch.randn(9, *shape, dtype=dtype)
    before, bounds = states.clone(), [0, 1, 131, 195, 212]
    out = run(q, k, v, states, bounds, [3, -1, 5, 0], [3, 1, 7, 2], backend)
    decay = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    start = before[[3, 3, 5, 0]].double()
    start[1] = 0
    wanted, end = lightning_attention(
        *(x.double()[None] for x in (q, k, v)), decay, scale=0.3, initial_state=start,
        cu_seqlens=torch.tensor(bounds), backend="naive",
    )  # fmt: skip
    torch.testing.assert_close(out.double(), wanted[0], **TOLERANCE[dtype])
    torch.testing.assert_close(states[[3, 1, 7, 2]].double(), end, **TOLERANCE[dtype])
    untouched = [0, 4, 5, 6, 8]
    assert torch.equal(states[untouched], before[untouched])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_bit_depends_on_cuts_company_or_threads(shape):
    rng, threads = random.Random(0), torch.get_num_threads()
    q, k, v = inputs(300, *shape)
    states = torch.zeros(4, *shape)
    wanted = run(q, k, v, states, [0, 300], [-1], [0])
    other = inputs(50, *shape, seed=1)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        pieces, start = [], 0
        pool = torch.full((4, *shape), float("nan"))
        while start < 300:
            size = min(rng.choice([1, 2, 63, 64, 65, 100]), 300 - start)
            part = [torch.cat([b, a[start : start + size]]) for a, b in zip((q, k, v), other, strict=True)]
            slot = 1 + start % 2 if start else -1
            out = run(*part, pool, [0, 50, 50 + size], [-1, slot], [3, 1 + (start + size) % 2])
            pieces.append(out[50:])
            start += size
        assert torch.equal(torch.cat(pieces), wanted)
        assert torch.equal(pool[1 + 300 % 2], states[0])
    torch.set_num_threads(threads)


def test_twenty_thousand_tokens_stay_accurate():
    q, k, v = inputs(20_000, 4, 32, 32)
    states = torch.zeros(1, 4, 32, 32)
    out = run(q, k, v, states, [0, 20_000], [-1], [0])
    decay = torch.tensor(alibi_slopes(4), dtype=torch.float64)
    wide = (x.double()[None] for x in (q, k, v))
    wanted, end = lightning_attention(*wide, decay, scale=0.3, backend="torch")
    error = (out.double() - wanted[0]).abs().max() / wanted.abs().max()
    assert error < 4e-6 and ((states[0].double() - end[0]).abs().max() / end.abs().max()) < 4e-6


def test_what_does_not_fit_is_refused():
    q, k, v = inputs(10, 2, 8, 8)
    with pytest.raises(ValueError, match=r"states must be \[slots, H, D, Dv\] = \[slots, 2, 8, 8\]"):
        run(q, k, v, torch.zeros(2, 2, 8, 7), [0, 10], [-1], [0])
    with pytest.raises(ValueError, match="must agree on N"):
        run(q, k, v, torch.zeros(2, 2, 8, 8), [0, 5, 10], [-1], [0])
    with pytest.raises(ValueError, match="q, k, v, decay must be"):
        run(q[:5], k, v, torch.zeros(2, 2, 8, 8), [0, 10], [-1], [0])
