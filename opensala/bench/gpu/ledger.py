"""The ledger `docs/gpu.md`: for each kernel and the whole model, at 64K to 1M tokens, what has to be done,
how long that takes at the ceilings of an H100 and an H200, and what was measured.

Made of data: block lists of the shipped model (`benchmarks/block_lists.csv`), rows measured on GPUs
(`benchmarks/results.csv`, to which `make gpu` adds), and the counts of `bench.counts`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...model.storage import cache_sizes
from .. import counts
from ..counts import Sharing, Work
from .outcome import find
from .sizes import K, Sizes

ROOT = Path(__file__).parents[3]
PAGE, ROWS, LISTS = ROOT / "docs/gpu.md", ROOT / "benchmarks/results.csv", ROOT / "benchmarks/block_lists.csv"
LENGTHS = (64 * K, 128 * K, 256 * K, 512 * K, 1024 * K)
PRODUCTS = 0.9  # of the rate of a product of 8192^3, by those of a chunk
LAUNCH = 1.5e-6  # seconds between two kernels of a replayed graph
LAUNCHES = 350  # of a decoding step


@dataclass(frozen=True)
class Card:
    """Ceilings: bf16 products of 8192^3 (FLOP/s), a copy (bytes/s, both ways counted), exponentials/s (16 a
    clock and multiprocessor)."""

    name: str
    rate: float
    copy: float
    exponentials: float = 132 * 16 * 1.755e9

    def seconds(self, work: Work, share: float = 1.0) -> float:
        """At the ceilings: products, then exponentials; or the bytes, if they take longer."""
        return max(
            work.flops / (self.rate * share) + work.exponentials / self.exponentials, work.moved / self.copy
        )


CARDS = (Card("H100", 798e12, 3.0e12), Card("H200", 788e12, 4.3e12))


@dataclass(frozen=True)
class Entry:
    """A line: what, how many tokens, the work, the seconds it cannot be below and those predicted on each
    card, the rows that measure it."""

    what: str
    tokens: int
    floor: Work
    predicted: tuple[float, ...]
    work: Work
    rows: tuple[dict[str, str], ...]


def read_sharing(path: Path = LISTS) -> Sharing:
    """The mean over the sparse layers of the file, weighted by their pairs."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [float(row["far_pairs"]) for row in rows]
    total = sum(pairs)
    shared = [float(row["shared"]) for row in rows]
    popular = sum(p * s for p, s in zip(pairs, shared, strict=True))
    blocks = sum(p * s / float(row["users"]) for p, s, row in zip(pairs, shared, rows, strict=True))
    return Sharing(popular / total, popular / blocks, int(rows[0]["tile"]))


def entries(lists: Sharing) -> list[Entry]:
    """All lines of the ledger."""
    return [entry for tokens in LENGTHS for entry in (*_kernels(tokens, lists), *_model(tokens, lists))]


def _kernels(tokens: int, lists: Sharing) -> list[Entry]:
    """One layer of each kind over a whole sequence."""
    s = Sizes()
    heads, kv_heads, dim, spec = s.heads, s.kv_heads, s.dim, s.spec
    found = []
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        floor = Work(0.0, 0.0, counts.lightning_bytes(tokens, s.lightning_heads, dim, size))
        work = counts.lightning_work(tokens, s.lightning_heads, dim, size)
        row = {"op": "lightning_attention", "shape": f"T={tokens} ", "dtype": dtype, "backend": "triton"}
        # Float32 products are not bound by the rate of bf16 ones: tf32 units do a half of it at most.
        halves = tuple(c.seconds(work, 1.0 if size == 2 else 0.5) for c in CARDS)
        found.append(Entry(f"Lightning, {dtype} in", tokens, floor, halves, work, (row,)))
    work = counts.selection_work(tokens, heads, kv_heads, dim, spec)
    floor = Work(counts.selection_flops(tokens, heads, dim, spec))
    row = {"op": "select_blocks", "shape": f"T={tokens} ", "has": " correlated"}
    found.append(Entry("selection", tokens, floor, tuple(c.seconds(work) for c in CARDS), work, (row,)))
    floor = Work(counts.sparse_flops(tokens, heads, dim, spec))
    row = {"op": "sparse_attention", "shape": f"T={tokens} ", "has": " correlated"}
    for what, sharing in (("pairs beyond the window", None), ("shared blocks in the band", lists)):
        parts = counts.attention_work(tokens, heads, kv_heads, dim, spec, sharing)
        seconds = tuple(sum(c.seconds(part) for part in parts) for c in CARDS)
        work = parts[0] + parts[1]
        found.append(Entry(f"sparse attention, {what}", tokens, floor, seconds, work, (row,)))
    return [*found, *_last_chunk(tokens, lists)]


def _last_chunk(tokens: int, lists: Sharing) -> list[Entry]:
    """The last chunk of the longest texts, which are not put through a kernel whole."""
    s = Sizes()
    if tokens not in s.far:
        return []
    before, found = tokens - s.chunk, []
    shape = {"kind": "chunk", "shape": f"T={s.chunk} ", "has": f" correlated last of L={tokens}"}
    selection = [counts.selection_work(n, s.heads, s.kv_heads, s.dim, s.spec) for n in (tokens, before)]
    parts = [counts.attention_work(n, s.heads, s.kv_heads, s.dim, s.spec, lists) for n in (tokens, before)]
    for what, op, whole, less, flops in (
        ("selection", "select_blocks", selection[:1], selection[1:], counts.selection_flops),
        ("sparse attention, shared", "sparse_attention", parts[0], parts[1], counts.sparse_flops),
    ):
        works = [a + b.times(-1) for a, b in zip(whole, less, strict=True)]
        seconds = tuple(sum(card.seconds(w) for w in works) for card in CARDS)
        floor = Work(flops(tokens, s.heads, s.dim, s.spec) - flops(before, s.heads, s.dim, s.spec))
        name = f"{what}, last {s.chunk:,} tokens"
        found.append(Entry(name, tokens, floor, seconds, sum(works, Work()), ({"op": op, **shape},)))
    return found


def _model(tokens: int, lists: Sharing) -> list[Entry]:
    """The whole 9B model: a prompt, and a decoding step behind it."""
    s, config = Sizes(), Sizes().config()
    layers = config.num_hidden_layers
    sparse = counts.sparse_layers(config)
    by_name = {e.what: e for e in _kernels(tokens, lists)}
    kernels = [
        (sparse, by_name["selection"]),
        (sparse, by_name["sparse attention, shared blocks in the band"]),
        (layers - sparse, by_name["Lightning, bfloat16 in"]),
    ]
    total = counts.prefill_flops(config, tokens)
    of_kernels = sum(n * e.floor.flops for n, e in kernels)
    of_kernels += (layers - sparse) * counts.lightning_flops(tokens, s.lightning_heads, s.dim, s.dim)
    products = Work(total - of_kernels)
    between = Work(0.0, 0.0, counts.elementwise_bytes(config, tokens))
    work = products + between
    for n, e in kernels:
        work = work + e.work.times(n)
    seconds = tuple(
        card.seconds(products, PRODUCTS) + card.seconds(between) + sum(n * e.predicted[i] for n, e in kernels)
        for i, card in enumerate(CARDS)
    )
    name = {"backend": "SALA 9B shape", "shape": f"T={tokens}"}
    prompt = Entry("9B, first token", tokens, Work(total), seconds, work, ({"op": "first token", **name},))
    step = counts.decode_work(config, tokens, weight_bytes())
    spent = tuple(card.seconds(step) + LAUNCHES * LAUNCH for card in CARDS)
    row = {"op": "decode step", "kind": "decode", **name}
    return [prompt, Entry("9B, decoding step", tokens, Work(0.0, 0.0, weight_bytes()), spent, step, (row,))]


def weight_bytes() -> float:
    """Bytes of the 9B model's bf16 weights that a decoding step reads: all but the embeddings."""
    config = Sizes().config()
    return 2.0 * (counts.product_weights(config) + config.vocab_size * config.hidden_size)


def memory(tokens: int) -> dict[str, float]:
    """Bytes of the whole model reading so many tokens: weights, cache, both."""
    config = Sizes().config()
    sizes = cache_sizes(config, torch.bfloat16)
    weights = weight_bytes() + 2.0 * config.vocab_size * config.hidden_size
    cache = sizes.page * (tokens // config.block_spec.block_size + 2) + 4.0 * sizes.slot
    return {"weights": weights, "cache": cache, "both": weights + cache}


def measured(rows: list[dict[str, Any]], card: str, entry: Entry) -> str:
    """Milliseconds of the last row that measures an entry on a card, empty if there is none."""
    mine = [row for row in rows if card in row["machine"]]
    for wanted in entry.rows:
        columns = dict(wanted)
        op, kind = columns.pop("op"), columns.pop("kind", "forward")
        exact = "backend" in columns and columns["backend"] != "triton"
        row = find(mine, op, kind, **columns)
        if row and (not exact or row["shape"] == wanted["shape"]):
            return _number(float(row["p50_ms"]))
    return ""


def read_rows(path: Path = ROWS) -> list[dict[str, Any]]:
    """Rows measured on a GPU."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if "NVIDIA" in row["machine"]]


def page(lists: Sharing, rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    head = ["what", "tokens", "TFLOP", "G exp", "GB"]
    for card in CARDS:
        head += [f"{card.name}: floor", "predicted", "measured"]
    lines = []
    for e in entries(lists):
        cells = [e.what, f"{e.tokens // K}K", _number(e.work.flops / 1e12)]
        cells += [_number(e.work.exponentials / 1e9), _number(e.work.moved / 1e9)]
        for card, seconds in zip(CARDS, e.predicted, strict=True):
            cells += [
                _number(card.seconds(e.floor) * 1e3),
                _number(seconds * 1e3),
                measured(rows, card.name, e),
            ]
        lines.append(cells)
    peaks = [_peak(rows, tokens) for tokens in LENGTHS]
    return _TEXT.format(
        table=_table(head, lines),
        memory=_table(["tokens", "weights, GB", "cache, GB", "both, GB", "peak measured, GB"], peaks),
        ceilings="; ".join(
            f"{c.name}: {c.rate / 1e12:.0f} TFLOP/s and {c.copy / 1e12:.1f} TB/s" for c in CARDS
        ),
        exponentials=f"{CARDS[0].exponentials / 1e12:.1f}",
        products=f"{PRODUCTS:.0%}",
        launches=f"{LAUNCHES}",
        gap=f"{LAUNCH * 1e6:g}",
        shared=f"{lists.shared:.0%}",
        users=f"{lists.users:.1f}",
        tile=lists.tile,
        measured=_provenance(rows),
    )


def _peak(rows: list[dict[str, Any]], tokens: int) -> list[str]:
    parts = memory(tokens)
    row = find(rows, "first token", backend="SALA 9B shape", shape=f"T={tokens}")
    peak = ""
    if row and row["shape"] == f"T={tokens}" and row["peak_mib"]:
        peak = f"{float(row['peak_mib']) * 2**20 / 1e9:.2f}"
    return [f"{tokens // K}K", *(f"{parts[name] / 1e9:.2f}" for name in ("weights", "cache", "both")), peak]


def _provenance(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Nothing has been measured yet."
    seen = {
        row["machine"]: f"{row['machine']}, {row['time'][:10]}, torch {row['torch']}, Triton {row['triton']}"
        for row in rows
    }
    return f"Measured, the last row of each: {'; '.join(seen.values())}."


def _number(x: float) -> str:
    """Three significant digits, without an exponent."""
    if x == 0:
        return ""
    digits = max(0, 2 - len(str(int(abs(x)))) + 1) if abs(x) >= 1 else 3
    return f"{x:,.{digits}f}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


_TEXT = """# What a GPU has to do, and how long it takes

<!-- made by `python scripts/build_ledger.py`; do not edit -->

One line for each kernel (one layer over a whole sequence, at the released sizes: 32 heads of 128, 2 kv heads,
96 blocks of 64 in all) and for the whole 9B model in bfloat16 (first token of a prompt; one decoding step
behind it). Times are in milliseconds. {measured}

- **TFLOP, G exp, GB**: what is counted of the kernels as they are: operations of matrix products,
  exponentials, bytes of GPU memory.
- **floor**: what the work cannot avoid (`opensala/bench/counts.py`), at the card's ceilings: {ceilings}
  (a bf16 product of 8192^3, and a copy with both ways counted, as measured on such cards).
- **predicted**: the counted work at the same ceilings: products, then exponentials ({exponentials} T/s: 16 a
  clock and multiprocessor), or the bytes, whichever takes longer. Addresses, masks and waiting are not
  counted, so that a measured time above it is instructions or waiting. The whole model adds its products at
  {products} of the rate and what lies between them, by bytes; a decoding step {launches} launches of a
  replayed graph, {gap} us apart.
- **measured**: medians of `make gpu`, which fills the column; correlated queries.

Far blocks (those before the window) that at least half of {tile} neighbouring queries chose make up {shared}
of all far pairs in the shipped model's lists on a real text, and {users} of the {tile} queries chose such a
block on average (`benchmarks/block_lists.csv`). The line "shared blocks in the band" takes these numbers for
the released sizes too; a kernel that leaves every far block to pairs is the line above it. Measured times are
the same in both lines: the kernel is what it is.

{table}

## Memory

Weights and cache in bfloat16, one text; activations come on top.

{memory}
"""
