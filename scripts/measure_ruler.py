"""Runs of RULER side by side: rows, plots and tables for docs/results.md.

    python scripts/measure_ruler.py "shipped model=runs/ruler/auto" "every key read=runs/ruler/dense"
    python scripts/measure_ruler.py --real hybrid=runs/ruler/hybrid original

Each argument is a name and the folder, or folders separated by commas, that `opensala eval -o` (or
scripts/ask_original.py) wrote; a name alone stands for its rows of last time. Rows of benchmarks/ruler.csv
are replaced as a whole, one for each question; the tables go into docs/results.md between their marks.
`--real` is for the converted model: rows of benchmarks/real_ruler.csv, tables between marks of their own, no
pictures. Questions about one document are not independent, so standard errors are taken over documents.
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

from opensala.data.ruler import TASKS
from opensala.evaluate.plots import depth_map, length_curves
from opensala.evaluate.results import read_header, read_samples
from opensala.evaluate.tables import length_name, row

ROOT = Path(__file__).parents[1]
BENCHMARKS, IMAGES, PAGE = ROOT / "benchmarks", ROOT / "docs" / "images", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- tables: scripts/measure_ruler.py{} -->", "<!-- end of tables -->"
FIELDS = (
    "variant",
    "task",
    "length",
    "document",
    "question",
    "depth",
    "score",
    "prediction",
    "references",
    "prompt_tokens",
    "read_tokens",
    "seconds",
    "machine",
    "torch",
    "opensala",
)
SHOWN = 60  # characters of an answer that are kept
SOLVED = ("niah_single_1", "niah_single_2", "niah_multikey_1")
SEPARATE = (*SOLVED, "niah_multikey_2")  # with one answer at one place, and not all missed

Cells = dict[tuple[str, int], list[float]]  # task, length -> mean score of each document, 0 to 100


def rows_of(variant: str, folders: str) -> list[dict[str, Any]]:
    found = []
    for folder in map(Path, folders.split(",")):
        found += _rows(variant, folder)
    return found


def rows_of_last_time(variant: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a variant in the CSV file."""
    whole, fraction = ("length", "document", "question", "prompt_tokens", "read_tokens"), ("score",)
    with path.open(newline="", encoding="utf-8") as file:
        found: list[dict[str, Any]] = [r for r in csv.DictReader(file) if r["variant"] == variant]
    if not found:
        raise typer.BadParameter(f"{path} has no rows of {variant!r}: give {variant}=FOLDER")
    for r in found:
        r |= {name: int(r[name]) for name in whole} | {name: float(r[name]) for name in fraction}
    return found


def _rows(variant: str, folder: Path) -> list[dict[str, Any]]:
    run = read_header(folder)["runs"][-1]
    found = []
    for sample in read_samples(folder):
        document, question = sample["id"].split("/")[-2:]
        found.append(
            sample
            | {
                "variant": variant,
                "document": int(document),
                "question": int(question),
                "prediction": sample["prediction"][:SHOWN],
                "references": "; ".join(sample["references"])[:SHOWN],
                **{k: run.get(k, "") for k in ("machine", "torch", "opensala")},
            }
        )
    return found


def cells_of(rows: list[dict[str, Any]]) -> tuple[Cells, dict[tuple[str, int], int]]:
    """Mean score of each document, and the number of answers, by task and length."""
    scores: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for r in rows:
        scores[r["task"], r["length"], r["document"]].append(100 * r["score"])
    cells: Cells = defaultdict(list)
    count: dict[tuple[str, int], int] = defaultdict(int)
    for (task, length, _), found in sorted(scores.items()):
        cells[task, length].append(mean(found))
        count[task, length] += len(found)
    return cells, count


def error_of(means: list[float]) -> float | None:
    """Standard error of the mean over documents; None for one document."""
    return stdev(means) / len(means) ** 0.5 if len(means) > 1 else None


def table(variant: str, rows: list[dict[str, Any]]) -> str:
    """Score, standard error where there are several documents, and number of answers, for each task and
    length."""
    cells, count = cells_of(rows)
    lengths = sorted({n for _, n in cells})
    lines = [row(variant, *map(length_name, lengths)), "|---" + "|---:" * len(lengths) + "|"]
    for task in (t for t in TASKS if any((t, n) in cells for n in lengths)):
        texts = []
        for n in lengths:
            means = cells.get((task, n))
            error = error_of(means) if means else None
            texts.append(
                ""
                if not means
                else f"{mean(means):.0f}{f' ± {error:.0f}' if error else ''} ({count[task, n]})"
            )
        lines.append(row(task, *texts))
    return "\n".join(
        [
            *lines,
            row("average", *(_average([cells[t, n] for t in TASKS if (t, n) in cells]) for n in lengths)),
        ]
    )


def _average(tasks: list[list[float]]) -> str:
    """Over all thirteen tasks; of fewer it would say which were run."""
    if len(tasks) < len(TASKS):
        return ""
    errors = [error_of(means) for means in tasks]
    known = [e for e in errors if e is not None]
    return f"**{mean(map(mean, tasks)):.1f}**" + (
        f" ± {sum(e * e for e in known) ** 0.5 / len(tasks):.1f}" if len(known) == len(tasks) else ""
    )


def compare(variants: dict[str, list[dict[str, Any]]], path: Path) -> str:
    """A table and a picture of what all variants were asked: mean over tasks, the same questions read in
    different ways."""
    sets = {
        name: {(r["task"], r["length"], r["document"], r["question"]): r["score"] for r in rows}
        for name, rows in variants.items()
    }
    shared = set.intersection(*(set(s) for s in sets.values()))
    if not shared:
        return ""
    lengths = sorted({n for _, n, _, _ in shared})
    curves, lines = (
        {},
        [row("the same questions", *map(length_name, lengths)), "|---" + "|---:" * len(lengths) + "|"],
    )
    for name, scores in sets.items():
        cells: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for task, length, document, question in shared:
            cells[length][task].append(100 * scores[task, length, document, question])
        curves[name] = {n: mean(map(mean, tasks.values())) for n, tasks in cells.items()}
        lines.append(row(name, *(f"{curves[name][n]:.1f} ({len(cells[n])} tasks)" for n in lengths)))
    whole = {
        n for n in lengths if len(cells[n]) == len(TASKS)
    }  # a mean over fewer tasks is no point of the same curve
    curves = {name: {n: score for n, score in curve.items() if n in whole} for name, curve in curves.items()}
    length_curves(curves, "RULER, the same questions: mean over the thirteen tasks", path)
    first, second = list(variants.values())[:2]
    texts = {(r["task"], r["length"], r["document"], r["question"]): r["prediction"] for r in second}
    for title, tasks in (
        ("answers that are the same text", tuple(TASKS)),
        (f"the same in {', '.join(SOLVED)}", SOLVED),
    ):
        alike = defaultdict(list)
        for r in first:
            key = (r["task"], r["length"], r["document"], r["question"])
            if key in shared and r["task"] in tasks:
                alike[r["length"]].append(texts[key] == r["prediction"])
        lines.append(row(title, *(f"{sum(alike[n])} of {len(alike[n])}" for n in lengths)))
    return "\n".join(lines)


def main(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="NAME[=FOLDER]...", help="runs to show, the one to plot in full first"),
    ],
    real: Annotated[bool, typer.Option("--real", help="The converted model and its original.")] = False,
) -> None:
    """Write the rows, the pictures, and the tables of docs/results.md."""
    path = BENCHMARKS / ("real_ruler.csv" if real else "ruler.csv")
    variants = {
        name: rows_of(name, folders) if folders else rows_of_last_time(name, path)
        for name, _, folders in (entry.partition("=") for entry in runs)
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for rows in variants.values():
            writer.writerows(
                sorted(
                    rows,
                    key=lambda r: (r["length"], list(TASKS).index(r["task"]), r["document"], r["question"]),
                )
            )
    tables = [table(name, rows) for name, rows in variants.items()]
    if not real:
        tables += draw(variants)
    begin = BEGIN.format(" --real" if real else "")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    PAGE.write_text(
        "\n".join([f"{head}{begin}\n", *(f"{t}\n" for t in tables if t), END + rest.partition(END)[2]]),
        encoding="utf-8",
    )


def draw(variants: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The pictures; the table that belongs to the last one."""
    first, rows = next(iter(variants.items()))
    cells, _ = cells_of(rows)
    curves = {
        t: {n: mean(cells[t, n]) for u, n in cells if u == t} for t in TASKS if any(u == t for u, _ in cells)
    }
    length_curves(curves, f"RULER's thirteen task types, {first}", IMAGES / "ruler-lengths.png")
    depth_map(
        [r for r in rows if r["task"] in SEPARATE],
        f"RULER by depth and length, {first}",
        IMAGES / "ruler-depths.png",
    )
    if len(variants) < 2:
        return []
    return [compare(dict(list(variants.items())[:2]), IMAGES / "ruler-dense.png")]


if __name__ == "__main__":
    typer.run(main)
