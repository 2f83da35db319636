"""The Triton forms of the ops over pages against the reference implementation, on small shapes."""

import math

import pytest
import torch

from opensala.ops import BlockSpec, KVPages, compress_keys, store_kv
from tests.ops.grid import HAS_TRITON, TRITON_DEVICE, assert_close, nothing_waits
from tests.ops.test_paged import SMALL, SPECS, Case

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.filterwarnings(
        "ignore:divide by zero encountered in log2"
    ),  # a part without keys: -inf is meant
]


class DeviceCase(Case):
    """A case whose pool and tables lie where the kernels run; its lists of q, k, v stay on the CPU."""

    def new_pool(self) -> KVPages:
        return KVPages(*(x.to(TRITON_DEVICE) for x in super().new_pool()))

    def table(self, starts, ends):
        return type(super().table(starts, ends))(*(x.to(TRITON_DEVICE) for x in super().table(starts, ends)))

    def packed(self, x, starts, ends):
        return super().packed(x, starts, ends).to(TRITON_DEVICE)


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
        keys, values, *levels = (x.cpu() for x in case.stored(n))
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
        keys, values, *levels = (x.cpu() for x in case.stored(n))
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


def test_storing_never_waits_for_the_device():
    case = DeviceCase(SMALL, [40, 20])
    table = case.table([30, 20], [40, 20])
    k, v = (case.packed(x, [30, 20], [40, 20]) for x in (case.k, case.v))
    with nothing_waits():
        store_kv(k, v, case.pool, table, SMALL, backend="triton")
