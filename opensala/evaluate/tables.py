"""Scores as Markdown tables: one row a task, one column a length."""

from typing import Any


def length_name(length: int) -> str:
    """4096 is 4K, 1000000 is 1000K as the papers write it, 32000 is 32K; 0 is for what has no lengths."""
    if length == 0:
        return "all"
    for unit, name in ((2**20, "M"), (1024, "K"), (1000, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def score_table(summary: dict[str, Any]) -> str:
    """A table for each suite, with the average over tasks as its last row; scores from 0 to 100."""
    return "\n\n".join(_suite_table(name, table) for name, table in summary["suites"].items())


def _suite_table(name: str, table: dict[str, Any]) -> str:
    lengths = sorted({n for cells in table["tasks"].values() for n in cells}, key=int)
    lines = [row(name, *(length_name(int(n)) for n in lengths)), "|---" + "|---:" * len(lengths) + "|"]
    for task, cells in table["tasks"].items():
        lines.append(
            row(
                task,
                *(f"{cells[n]['score']:.1f} ({cells[n]['samples']})" if n in cells else "" for n in lengths),
            )
        )
    average = table["average"]
    lines.append(row("average", *(f"{average[n]['score']:.1f}" if n in average else "" for n in lengths)))
    return "\n".join(lines)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def figures_table(figures: dict[str, Any]) -> str:
    """lm-eval's figures: a row for each task and group, with its standard error; empty without any."""
    rows = []
    for task, values in figures.get("results", {}).items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if kind and not name.endswith("_stderr") and isinstance(value, (int, float)):
                error = values.get(f"{name}_stderr,{kind}")
                rows.append(
                    row(
                        task,
                        name if kind == "none" else f"{name} ({kind})",
                        f"{value:.4f}",
                        f"{error:.4f}" if isinstance(error, (int, float)) else "",
                    )
                )
    return (
        "\n".join([row("lm-eval", "figure", "value", "standard error"), "|---|---|---:|---:|", *rows])
        if rows
        else ""
    )
