"""The comparison as a table in the paper's layout, lengths across, and as pictures."""

from pathlib import Path
from typing import Any

from rich.table import Table

from ...evaluate.plots import plot_lines
from ...evaluate.tables import length_name
from ..record import Report

FIGURES = {
    "first_s": "time to first token, s",
    "end_to_end_s": "end to end with 1K generated, s",
    "step_p50_ms": "ms per token",
    "peak_mib": "peak memory, MiB",
    "cache_mib": "cache, MiB",
}


def show(report: Report) -> None:
    """Print one table for each figure."""
    lengths = sorted({row["tokens"] for row in report.rows})
    names = list(dict.fromkeys(row["contender"] for row in report.rows))
    cells = {(row["contender"], row["tokens"]): row for row in report.rows}
    for figure, title in FIGURES.items():
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        for tokens in lengths:
            table.add_column(length_name(tokens), justify="right")
        for name in names:
            table.add_row(name, *(cell(cells.get((name, n)), figure) for n in lengths))
        report.console.print(table)


def cell(row: dict[str, Any] | None, figure: str) -> str:
    """What stands in the table: a figure, `OOM`, or `-` for what was left out."""
    if row is None or row["status"].startswith("left out"):
        return "-"
    return "OOM" if row["status"].startswith("OOM") else f"{row[figure]:g}"


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """One picture for each figure in `folder`: a line for each contender, both axes logarithmic."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure, title in FIGURES.items():
        curves: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["status"] == "measured":
                curves.setdefault(row["contender"], {})[row["tokens"]] = row[figure]
        plot_lines(curves, title, folder / f"speed-{figure}.png")
