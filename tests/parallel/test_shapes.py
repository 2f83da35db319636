"""What needs no second process: grids, decays between ranks, and the table of traffic in the
documentation."""

import re
from pathlib import Path

import pytest
import torch

from opensala import MiniCPMSALAConfig
from opensala.parallel import ParallelConfig, context_volume
from opensala.parallel.exchange import decays_between

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"


@pytest.mark.parametrize(
    ("asked", "world", "shard"), [((None, 1), 1, 1), ((None, 2), 8, 4), ((4, 2), 8, 4), ((1, 8), 8, 1)]
)
def test_a_grid_that_fits(asked, world, shard):
    assert ParallelConfig(*asked).resolve(world).dp_shard == shard


@pytest.mark.parametrize(
    ("asked", "world", "words"),
    [
        ((None, 3), 8, "cp = 3 does not fit 8 processes.*1, 2, 4, 8"),
        ((3, 2), 8, r"3 \* 2 does not fit 8"),
        ((None, 4), 2, "cp = 4 does not fit 2"),
        ((1, 1), 2, r"1 \* 1 does not fit 2"),
    ],
)
def test_a_grid_that_does_not_fit(asked, world, words):
    with pytest.raises(ValueError, match=words):
        ParallelConfig(*asked).resolve(world)


@pytest.mark.parametrize(
    ("field", "value"), [("cp", 0), ("cp", 1.5), ("cp", None), ("dp_shard", -1), ("dp_shard", True)]
)
def test_numbers_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a whole number of at least 1, got {value}"):
        ParallelConfig(**{field: value})


def test_decays_between_ranks():
    """Rank 3's sequence began on rank 1, rank 2's too; rank 0 and 1 begin their own. 10 tokens a rank, rates
    0.5 and 0."""
    got = decays_between([0.5, 0.0], 10, (0, 0, 1, 2))
    wanted = torch.zeros(4, 4, 2, dtype=torch.float64)
    wanted[2, 1] = wanted[3, 2] = 1.0
    wanted[3, 1] = torch.tensor([-5.0, 0.0], dtype=torch.float64).exp()
    torch.testing.assert_close(got, wanted)
    assert decays_between([10.0], 10, (0, 1, 2))[2, 0] == 0  # cut off, as in the kernels


def test_the_table_of_traffic():
    rows = re.findall(
        r"^\| (\d+)K \| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$", PAGE.read_text(), re.M
    )
    assert len(rows) == 4
    for length, ranks, keys, states, everything in rows:
        volume = context_volume(MiniCPMSALAConfig(), int(ranks), int(length) * 1024, checkpointing=True)
        got = 8 * (2 * volume.sparse_forward + volume.sparse_backward), 24 * 3 * volume.lightning, volume.step
        assert [f"{x / 1e9:.2f}" for x in got] == [keys, states, everything]
