"""What a run tells its user: the plan and plots. Nothing here decides anything."""

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .plan import Planned, available_bytes


def print_plan(rows: list[Planned], device: torch.device) -> None:
    """Phases with steps, tokens, seconds and memory, on stderr; and whether they fit."""
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "steps", "tokens", "seconds a step", "tokens/s", "expected time", "memory, MiB"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.steps:,}",
            f"{row.steps * row.tokens:,}",
            f"{row.seconds:.2f}",
            f"{row.tokens / max(row.seconds, 1e-9):,.0f}",
            _clock(row.steps * row.seconds),
            f"{row.memory / 2**20:,.0f}" if row.memory else "",
        )
    console = Console(file=sys.stderr, soft_wrap=True)
    console.print(table)
    free, most = available_bytes(device), max((row.memory for row in rows), default=0)
    console.print(
        f"in all {_clock(sum(row.steps * row.seconds for row in rows))}; "
        f"{free / 2**20:,.0f} MiB free on {device}"
        + ("" if most <= free else ", which is too little: lower --micro-tokens, or --recompute"),
        highlight=False,
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _axes(title: str, x: str, y: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_alignment(records: list[dict[str, Any]], path: Path) -> None:
    """The relative error of every layer by step, from the metrics of the alignment."""
    figure, axes = _axes(
        "Alignment: error of each layer's Lightning mixer",
        "step",
        "squared error / mean square of the target",
    )
    layers = len(records[0]["relative"])
    window = max(1, len(records) // 60)
    for i in range(layers):
        values = [r["relative"][i] for r in records]
        smooth = [
            sum(values[max(0, n - window + 1) : n + 1]) / len(values[max(0, n - window + 1) : n + 1])
            for n in range(len(values))
        ]
        axes.plot(
            [r["step"] for r in records],
            smooth,
            color=f"C{i % 10}",
            linestyle="-" if i < 10 else "--",
            linewidth=1,
            label=str(i),
        )
    axes.set_yscale("log")
    axes.legend(title="layer", ncols=2, fontsize=7, loc="upper right")
    _save(figure, path)


def plot_importance(values: list[float], kept: list[int], label: str, path: Path) -> None:
    """Importance by layer; kept layers stand out."""
    figure, axes = _axes("Importance of each layer's softmax attention", "layer", label)
    colours = ["#c0392b" if i in kept else "#95a5a6" for i in range(len(values))]
    axes.bar(range(len(values)), values, color=colours)
    axes.set_xticks(range(len(values)))
    axes.bar([0], [0], color="#c0392b", label="kept")
    axes.legend()
    _save(figure, path)


def plot_distillation(records: list[dict[str, Any]], path: Path) -> None:
    """KL by step."""
    figure, axes = _axes("Distillation: divergence from the teacher", "step", "KL, nats a token")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=0.8)
    axes.set_yscale("log")
    _save(figure, path)
