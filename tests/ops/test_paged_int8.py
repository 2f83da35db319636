"""Keys and values in int8: what the ops compute is what they compute over the rows that int8 stands for."""

import math

import pytest
import torch

from opensala.ops import KVPages, paged_attention, select_blocks_paged, store_kv
from opensala.ops.sparse.int8 import SCALE_BYTES, pack_rows, unpack_rows
from tests.ops.grid import assert_close
from tests.ops.test_paged import HEADS, INVARIANT, SMALL, SPECS, Case, mixed, random_cuts


class Int8Case(Case):
    """Every scale begins as NaN: a row that nobody wrote shows."""

    def new_pool(self):
        pool = super().new_pool()
        width = [x.shape[-1] + SCALE_BYTES for x in pool[:2]]
        rows = [
            torch.full((*x.shape[:-1], n), -1, dtype=torch.int8) for x, n in zip(pool, width, strict=False)
        ]
        return KVPages(*rows, pool.k1, pool.k2)


def as_floats(pool):
    """A pool of the numbers that the rows stand for."""
    return KVPages(*(unpack_rows(x, torch.float32) for x in pool[:2]), pool.k1, pool.k2)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_int8_pages_give_the_bits_of_the_numbers_they_stand_for(spec, heads):
    lengths, cached = mixed(spec)
    case = Int8Case(spec, lengths, heads)
    blocks, out = case.run(cached, "cpp")
    floats = as_floats(case.pool)
    table, q = case.table(cached, lengths), case.packed(case.q, cached, lengths)
    assert torch.equal(blocks, select_blocks_paged(q, floats, table, spec, backend="cpp"))
    assert torch.equal(out, paged_attention(q, floats, table, blocks, spec, backend="cpp"))
    plain = Case(spec, lengths, heads)  # compressed keys are those of the keys that are attended to
    k, v = ([x[n] for n in range(len(lengths))] for x in _unpacked(case))
    plain.k, plain.v = k, v
    plain.run(cached, "cpp")
    for n in range(len(lengths)):
        assert all(map(torch.equal, case.stored(n)[2:], plain.stored(n)[2:]))


def _unpacked(case):
    """Keys and values of each sequence as they were kept."""
    kept = [case.stored(n)[:2] for n in range(len(case.lengths))]
    return [[unpack_rows(x[i], torch.float32) for x in kept] for i in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pytorch_and_cpp_write_the_same_bytes(dtype):
    case = Int8Case(SMALL, [333, 20], dtype=dtype, pool_dtype=dtype)
    pools = [case.new_pool(), case.new_pool()]
    for pool, backend in zip(pools, ("torch", "cpp"), strict=True):
        case.store([0, 0], case.lengths, pool, backend)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*pools, strict=True))


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_the_forms_agree(backend):
    lengths, cached = mixed(SMALL)
    case = Int8Case(SMALL, lengths)
    wanted = case.run(cached, "cpp")
    case.pool = case.new_pool()
    blocks, out = case.run(cached, backend)
    same = (blocks == wanted[0]).all(-1).all(-1)
    assert same.double().mean() > 0.99
    assert_close(out[same], wanted[1][same].double(), 2e-5)


@pytest.mark.parametrize("spec", INVARIANT.values(), ids=INVARIANT)
def test_no_bit_depends_on_cuts(spec):
    """A page that is filled token by token holds what one that comes whole holds."""
    case = Int8Case(spec, [700, 333, 90], sparse=[1, 0, 1])
    outs = [x.split(case.lengths) for x in case.run([0, 0, 0], "cpp")]
    whole = [(b, o, *case.stored(n)) for n, (b, o) in enumerate(zip(*outs, strict=True))]
    case.pool, parts = case.new_pool(), [([], []) for _ in case.lengths]
    for starts, ends in random_cuts(case, 1):
        news = [b - a for a, b in zip(starts, ends, strict=True)]
        made = case.run(starts, "cpp", ends, past=False)
        for found, pieces in zip(made, zip(*parts, strict=True), strict=True):
            for piece, new in zip(pieces, found.split(news), strict=True):
                piece.append(new)
    for n, wanted in enumerate(whole):
        got = (*(torch.cat(x) for x in parts[n]), *case.stored(n))
        assert all(map(torch.equal, got, wanted))


def test_rows_are_rounded_to_their_own_scale():
    x = (
        torch.randn(50, 3, 40, generator=torch.Generator().manual_seed(3))
        * torch.logspace(-30, 30, 50)[:, None, None]
    )
    x[7] = 0
    back = unpack_rows(pack_rows(x), torch.float32)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((back - x).abs() <= 0.5001 * step).all() and torch.equal(back[7], torch.zeros(3, 40))
    assert torch.equal(pack_rows(back), pack_rows(x)), "packing again changes nothing"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e-45, 3e38], ids=str)
def test_rows_of_odd_numbers(bad):
    """What is not finite is seen where it is used, the smallest numbers do not overflow; the same in C++."""
    case = Int8Case(SMALL, [5])
    case.k[0][3, 1, 7] = bad
    case.k[0][4] *= 1e-43
    pools = [case.new_pool(), case.new_pool()]
    for pool, backend in zip(pools, ("torch", "cpp"), strict=True):
        case.store([0], [5], pool, backend)
    rows = [unpack_rows(p.keys[case.pages[0, 0]], torch.float32) for p in pools]
    assert torch.equal(*(r.nan_to_num(7.0) for r in rows))
    assert bool(rows[0][3, 1].isnan().all()) == (not math.isfinite(bad))
    assert rows[0][4].isfinite().all() and (rows[0][4] - case.k[0][4]).abs().max() < 2e-43


def test_what_does_not_fit_is_refused():
    case = Int8Case(SMALL, [40])
    table, q, k, v = case.table([0], [40]), case.q[0], case.k[0], case.v[0]
    for call, message in (
        (
            lambda: store_kv(k[..., :8], v, case.pool, table, SMALL),
            r"k must be \[T, Hkv, D\] = \[40, 2, 32\]",
        ),
        (
            lambda: store_kv(k, v, case.pool._replace(values=case.pool.values.float()), table, SMALL),
            "pool.values must be .* in torch.int8 .* got .* in torch.float32",
        ),
        (
            lambda: store_kv(k, v, case.pool._replace(keys=case.pool.keys[..., :-1]), table, SMALL),
            r"pool.keys must be \[6, 16, 2, 36\]",
        ),
        (
            lambda: paged_attention(q, case.pool, table, None, SMALL, backend="triton"),
            "keys and values in int8 have no Triton form",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
