"""The ledger of the GPU: counts of what kernels do, held against counting one by one; the page against its
data."""

import pytest
import torch

from opensala.bench import counts
from opensala.bench.gpu import ledger
from opensala.bench.gpu.sizes import Sizes
from opensala.ops import BlockSpec, select_blocks

SPEC = BlockSpec(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4)


def test_the_page_is_made_of_its_data():
    page = ledger.page(ledger.read_sharing(), ledger.read_rows())
    assert page == ledger.PAGE.read_text(), "run scripts/build_ledger.py"


def lists(tokens=160):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, heads, 16, generator=generator) for heads in (4, 2))
    return select_blocks(q, k, SPEC, backend="torch")[0]


def test_sharing_equals_counting_one_by_one():
    blocks, tile = lists(), 8
    pairs = shared = wide = 0
    for head in range(2):
        for start in range(0, 160, tile):
            users = {}
            for t in range(start, start + tile):
                for block in blocks[t, head].tolist():
                    if 0 <= block < t // 16 - SPEC.window_blocks:
                        users[block] = users.get(block, 0) + 1
            pairs += sum(users.values())
            shared += sum(n for n in users.values() if n >= 4)
            wide += sum(n >= 4 for n in users.values())
    found = counts.sharing(blocks, SPEC)
    assert found.shared == shared / pairs and found.users == shared / wide
    with pytest.raises(ValueError, match="none of 40 queries has a block before its window"):
        counts.sharing(blocks[:40], SPEC)


def test_every_pair_of_the_lists_is_counted_once_in_band_or_pairs():
    """Without sharing, keys of band and pairs are those that the lists hold."""
    tokens, heads, kv_heads, dim = 160, 4, 2, 16
    keys = 0
    for t in range(tokens):
        own = t // 16
        listed = min(own + 1, SPEC.num_blocks)
        keys += (listed - 1) * 16 + t % 16 + 1
    band, pairs = counts.attention_work(tokens, heads, kv_heads, dim, SPEC, None)
    assert band.flops + pairs.flops == pytest.approx(4 * dim * heads * keys, rel=1e-12)
    assert band.exponentials + pairs.exponentials == pytest.approx(heads * keys, rel=1e-12)
    shared = counts.attention_work(tokens, heads, kv_heads, dim, SPEC, counts.Sharing(0.5, 4.0))
    # half of the pairs went to the band, which computes each of their blocks for twice as many queries
    assert shared[1].flops == pairs.flops / 2
    assert shared[0].flops - band.flops == pytest.approx(pairs.flops)


def test_what_is_counted_is_no_less_than_what_cannot_be_avoided():
    for entry in ledger.entries(ledger.read_sharing()):
        assert entry.work.flops >= 0.97 * entry.floor.flops and entry.work.moved >= entry.floor.moved, entry
        for card, seconds in zip(ledger.CARDS, entry.predicted, strict=True):
            assert seconds >= 0.97 * card.seconds(entry.floor), entry


def test_weights_and_cache_of_the_released_model():
    parts = ledger.memory(1 << 20)
    assert round(parts["weights"] / 1e9, 2) == 18.95 and round(ledger.weight_bytes() / 1e9, 2) == 18.35
    assert 9.0e9 < parts["cache"] < 9.3e9 and parts["both"] < 30e9


def test_make_gpu_fills_the_measured_columns():
    def row(op, shape, ms, kind="forward", **others):
        columns = {
            "machine": "NVIDIA H100 80GB HBM3",
            "time": "2026-11-26 20:00",
            "torch": "2.11",
            "triton": "3.6",
        }
        columns |= {"op": op, "pass": kind, "backend": "triton", "dtype": "bfloat16", "shape": shape}
        return columns | {"p50_ms": str(ms), "peak_mib": "20000"} | others

    shape = "T=262144 Hq=32 Hkv=2 D=128 blocks=96x64"
    last = "T=4096 Hq=32 Hkv=2 D=128 blocks=96x64 correlated last of L=1048576"
    rows = [
        row("select_blocks", f"{shape} correlated", 71.5),
        row("select_blocks", f"{shape} random", 1111),
        row("sparse_attention", f"{shape} correlated", 82.5),
        row("sparse_attention", last, 1.75, kind="chunk"),
        row("lightning_attention", "T=262144 H=32 D=128", 4.25),
        row("lightning_attention", "T=262144 H=32 D=128", 30.5, dtype="float32"),
        row("first token", "T=262144", 9250, backend="SALA 9B shape"),
        row("decode step", "T=262144", 7.25, kind="decode", backend="SALA 9B shape"),
    ]
    page = ledger.page(ledger.read_sharing(), rows)
    empty = ledger.page(ledger.read_sharing(), [])
    filled = {
        line.split("|")[1].strip(): line.split("|")[8].strip()
        for line, before in zip(page.splitlines(), empty.splitlines(), strict=True)
        if line != before and "| 256K |" in line and line.count("|") > 8
    }
    assert filled["selection"] == "71.5" and filled["Lightning, bfloat16 in"] == "4.25"
    assert filled["sparse attention, pairs beyond the window"] == "82.5"
    assert filled["sparse attention, shared blocks in the band"] == "82.5"
    assert filled["Lightning, float32 in"] == "30.5" and filled["9B, decoding step"] == "7.25"
    assert filled["9B, first token"] == "9,250"
    assert "| sparse attention, shared, last 4,096 tokens | 1024K |" in page
    line = next(
        x for x in page.splitlines() if x.startswith("| sparse attention, shared, last") and "1024K" in x
    )
    assert line.split("|")[8].strip() == "1.75"
    assert "NVIDIA H100 80GB HBM3, 2026-11-26, torch 2.11, Triton 3.6" in page
    assert "20.97" in page  # the peak, in GB


def test_cards_take_the_longer_of_arithmetic_and_bytes():
    card = ledger.Card("x", 1e12, 1e9, 1e9)
    assert card.seconds(counts.Work(2e12, 1e9, 1e9)) == 3.0
    assert card.seconds(counts.Work(2e12, 1e9, 5e9)) == 5.0
    assert Sizes().far[-1] in ledger.LENGTHS
