"""Measure teacher and converted models: recall and perplexity by length. Rows, plots and tables for
docs/conversion.md.

    python scripts/measure_conversion.py runs/teacher/model runs/convert [--lengths 256,512,1024]
    [--placements "0,3,11 0,6,11 none"]

Every folder below the second one that holds a finished run of `opensala convert` is a variant, named like its
folder.
Facts are hidden in held-out text, others than those the layers were chosen with; an answer counts if every
token of its value is the most likely one. `--placements` adds, for each choice of layers, what alignment
alone gives, with rotary positions left in the kept layers and without, using the mixers of the first run
found. Rows go to benchmarks/conversion.csv; `--report-only` makes plots and tables from them.
"""

import csv
import itertools
import json
import math
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer
from transformers import __version__ as transformers_version

from opensala import MiniCPMSALAForCausalLM
from opensala.convert import ConvertConfig, assemble, lightning_mixers, load_teacher, student_config
from opensala.convert.batches import Batches
from opensala.convert.probes import answers_right, token_scores
from opensala.convert.states import States
from opensala.data.packing import PackedText
from opensala.data.text import KINDS, documents

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "conversion.csv"
IMAGES = ROOT / "docs" / "images"
FIELDS = (
    "variant",
    "kept",
    "length",
    "facts",
    "found",
    "recall",
    "text_tokens",
    "nll",
    "perplexity",
    "threads",
    "commit",
    "machine",
    "torch",
    "transformers",
)
SEED = 7  # of the probes; the runs use 0


def measure(model: Any, batches: Batches, length: int, count: int) -> dict[str, float]:
    ids, marks = batches.recall_probes(length, count)
    batch = max(1, 4096 // length)
    found = answers_right(token_scores(model, ids, batch)[1], marks)
    texts = (text for kind in KINDS for text in documents(kind, "held_out"))
    packed = PackedText(batches.tokenizer, texts, length, characters=2_000_000)
    text = torch.from_numpy(packed.draw(SEED, 0, max(4, 32768 // length)).astype("int64"))
    nll = token_scores(model, text, batch)[0].mean().item()
    return {
        "facts": len(found),
        "found": sum(found),
        "recall": round(sum(found) / len(found), 4),
        "text_tokens": text.numel(),
        "nll": round(nll, 4),
        "perplexity": round(math.exp(nll), 2),
    }


def aligned_variants(teacher: Any, runs: Path, placements: str) -> Iterator[tuple[str, Any, str]]:
    """Name, model and kept layers of every placement, after alignment alone."""
    run = next(p for p in sorted(runs.iterdir()) if States(p).last("aligned"))
    mixers = lightning_mixers(teacher)
    States(run).load("aligned", mixers, None)
    for placement in placements.split():
        kept = [] if placement == "none" else [int(i) for i in placement.split(",")]
        for hype in (False, True):
            model = assemble(
                teacher, student_config(teacher.config, kept, hype=hype), dict(enumerate(mixers))
            )
            name = f"aligned {placement}, " + ("HyPE" if hype else "rotary")
            yield name, model, " ".join(map(str, kept)) or "none"


def tables(rows: list[dict[str, str]]) -> str:
    """Markdown: recall and perplexity, a line for each variant, a column for each length."""
    lengths = sorted({int(r["length"]) for r in rows})
    lines = []
    for title, cell in (
        ("recall", lambda r: f"{100 * float(r['recall']):.0f}%"),
        ("perplexity", lambda r: r["perplexity"]),
    ):
        lines += [
            f"| {title} | layers kept | " + " | ".join(map(str, lengths)) + " |",
            "|---" * (len(lengths) + 2) + "|",
        ]
        for name in dict.fromkeys(r["variant"] for r in rows):
            own = {int(r["length"]): r for r in rows if r["variant"] == name}
            kept = next(iter(own.values()))["kept"]
            lines.append(
                f"| {name} | {kept} | " + " | ".join(cell(own[n]) if n in own else "" for n in lengths) + " |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Recall and perplexity by length, one line for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for n, name in enumerate(dict.fromkeys(r["variant"] for r in rows if not r["variant"].endswith("HyPE"))):
        own = sorted(
            (int(r["length"]), float(r["recall"]), float(r["perplexity"]))
            for r in rows
            if r["variant"] == name
        )
        style = {
            "color": "black" if name == "teacher" else f"C{n}",
            "linestyle": "--" if "aligned" in name else "-",
            "marker": "o",
        }
        left.plot([x for x, _, _ in own], [100 * y for _, y, _ in own], label=name, **style)
        right.plot([x for x, _, _ in own], [y for _, _, y in own], **style)
    for axes, title in ((left, "facts found, %"), (right, "perplexity of held-out text")):
        axes.set_xscale("log", base=2)
        lengths = sorted({int(r["length"]) for r in rows})
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set(xlabel="tokens", title=title)
    left.set_ylim(-3, 103)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)


def main(
    teacher: Annotated[Path, typer.Argument(help="folder of the teacher's checkpoint")],
    runs: Annotated[Path, typer.Argument(help="folder of finished runs, one variant each")],
    lengths: str = "256,512,1024",
    documents_each: Annotated[
        int, typer.Option("--documents", help="documents with hidden facts of each length")
    ] = 32,
    placements: Annotated[str, typer.Option(help="choices of layers to measure after alignment alone")] = "",
    threads: int = 1,
    report_only: bool = False,
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if not report_only:
        batches = Batches(AutoTokenizer.from_pretrained(teacher), ConvertConfig(str(teacher), seed=SEED))
        original = load_teacher(teacher)
        variants = [("teacher", original, "all")]
        for folder in sorted(p for p in runs.iterdir() if (p / "model").is_dir()):
            kept = json.loads((folder / "selection.json").read_text())["kept"]
            variants.append(
                (
                    folder.name,
                    MiniCPMSALAForCausalLM.from_pretrained(folder / "model"),
                    " ".join(map(str, kept)) or "none",
                )
            )
        ROWS.parent.mkdir(exist_ok=True)
        common = {
            "threads": threads,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers_version,
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
            ).stdout.strip(),
        }
        with open(ROWS, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            for name, model, kept in itertools.chain(variants, aligned_variants(original, runs, placements)):
                for length in map(int, lengths.split(",")):
                    row = {
                        "variant": name,
                        "kept": kept,
                        "length": length,
                        **measure(model.eval(), batches, length, documents_each),
                        **common,
                    }
                    writer.writerow(row)
                    file.flush()
                    print(
                        f"{name} {length}: recall {row['recall']}, perplexity {row['perplexity']}", flush=True
                    )
    with open(ROWS, newline="") as file:
        rows = list(csv.DictReader(file))
    print(tables(rows))
    plot(rows, IMAGES / "conversion.png")


if __name__ == "__main__":
    typer.run(main)
