"""Measure how well a model finds facts, by length, depth and kind of document.

    python scripts/measure_small.py [--lengths 16384,65536] [--documents 5] [--model FOLDER]

Each document hides ten facts at spread depths, many of them alike, and each is asked for on its own with the
document read once. Rows go to benchmarks/retrieval.csv, the summary and plots are made from them by
`--report-only` as well. An answer counts only if it is exactly the hidden value.
"""

import csv
import platform
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import __version__ as transformers_version

from opensala.bench.record import append_rows
from opensala.data.needles import needle_document
from opensala.data.text import documents
from opensala.engine import Engine, SamplingParams, load_engine
from opensala.engine.progress import token_progress

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "retrieval.csv"
FIELDS = (
    "length",
    "kind",
    "document",
    "depth",
    "fact",
    "question",
    "expected",
    "answer",
    "correct",
    "model",
    "commit",
    "machine",
    "torch",
    "transformers",
)
FACTS = 10


def sources(kind: str, folder: Path | None) -> list[str]:
    """Texts of one kind: of this Python installation, or all text files below a folder."""
    if folder is None:
        return list(documents(kind))
    texts = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
    return texts


def shuffled(texts: list[str], characters: int, rng: random.Random) -> str:
    """Whole texts in random order up to so many characters, repeated if there are too few."""
    parts, total = [], 0
    while total < characters:
        for text in rng.sample(texts, len(texts)):
            parts.append(text)
            total += len(text)
            if total >= characters:
                break
    return "\n".join(parts)[:characters]


def measure(
    engine: Engine, texts: list[str], kind: str, length: int, count: int, seed: int
) -> Iterator[dict[str, object]]:
    common = {
        "model": engine.name if "opensala/assets" not in engine.name else "shipped",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
    }
    for n in range(count):
        rng = random.Random(f"{seed} {kind.split()[0]} {length} {n}")  # the same documents for every search
        document = needle_document(engine.tokenizer, shuffled(texts, length * 5, rng), length, FACTS, rng)
        with token_progress(f"{kind} {length:,} #{n}", len(document.ids)) as advance:
            prompts = [document.ids + trial.question for trial in document.trials]
            done = engine.generate(prompts, SamplingParams(max_tokens=24), on_read=advance)
        for trial, answer in zip(document.trials, (c.text.strip() for c in done), strict=True):
            yield {
                "length": length,
                "kind": kind,
                "document": n,
                "depth": round(trial.depth, 3),
                "fact": trial.fact.statement,
                "question": trial.fact.question,
                "expected": trial.fact.answer,
                "answer": answer,
                "correct": int(answer == trial.fact.answer),
                **common,
            }


def summary(rows: list[dict[str, str]]) -> str:
    """Markdown: one line for each kind of document, one column for each length."""
    lengths = sorted({int(r["length"]) for r in rows})
    table: dict[tuple[str, int], list[int]] = defaultdict(list)
    for r in rows:
        table[r["kind"], int(r["length"])].append(int(r["correct"]))
    lines = [
        "| kind | " + " | ".join(f"{n // 1024}K" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for kind in dict.fromkeys(r["kind"] for r in rows):
        cells = [f"{sum(c)}/{len(c)}" if (c := table[kind, n]) else "" for n in lengths]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Heat map of accuracy by depth and length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({int(r["length"]) for r in rows})
    grid = [[[] for _ in lengths] for _ in range(FACTS)]
    for r in rows:
        grid[min(FACTS - 1, int(float(r["depth"]) * FACTS))][lengths.index(int(r["length"]))].append(
            int(r["correct"])
        )
    share = [[100 * sum(c) / len(c) if c else float("nan") for c in line] for line in grid]
    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    image = axes.imshow(share, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto", alpha=0.6)
    for y, line in enumerate(share):
        for x, value in enumerate(line):
            if value == value:
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(
        range(len(lengths)),
        [f"{n // 1024}K\n(n={sum(len(c[x]) for c in grid)})" for x, n in enumerate(lengths)],
    )
    axes.set_yticks(range(FACTS), [f"{i * 100 // FACTS}-{(i + 1) * 100 // FACTS}%" for i in range(FACTS)])
    axes.set_xlabel("document length in tokens (facts asked for)")
    axes.set_ylabel("depth of the fact in the document")
    axes.set_title("Facts found by the shipped model, % (exact answers)")
    figure.colorbar(image, label="%")
    figure.savefig(path, dpi=130)


def main(
    lengths: str = "4096,16384,65536,262144",
    per_length: Annotated[
        int, typer.Option("--documents", help="documents of each kind and length, ten facts each")
    ] = 5,
    kinds: Annotated[
        str, typer.Option(help="code, prose, headers, or NAME=FOLDER for the text files of a folder")
    ] = "code",
    model: str | None = None,
    seed: int = 1,
    report_only: bool = False,
    search: Annotated[str, typer.Option(help="exact, or hierarchical choice of blocks")] = "exact",
) -> None:
    torch.set_flush_denormal(True)
    if not report_only:
        engine = load_engine(model, block_search=search)
        for kind in kinds.split(","):
            name, _, folder = kind.partition("=")
            texts = sources(name, Path(folder) if folder else None)
            label = name if search == "exact" else f"{name} ({search})"
            for length in map(int, lengths.split(",")):
                start, right = time.monotonic(), 0
                for row in measure(engine, texts, label, length, per_length, seed):
                    append_rows(ROWS, FIELDS, [row])
                    right += int(str(row["correct"]))
                print(
                    f"{label} {length}: {right}/{per_length * FACTS} in {time.monotonic() - start:.0f} s",
                    flush=True,
                )
    with open(ROWS, newline="") as file:
        rows = list(csv.DictReader(file))
    print(summary(rows))
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    plot([r for r in rows if "(" not in r["kind"]], ROOT / "docs" / "images" / "retrieval.png")


if __name__ == "__main__":
    typer.run(main)
