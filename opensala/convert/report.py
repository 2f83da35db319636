"""What a run tells its user: the plan and plots. Nothing here decides anything."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..model import MiniCPMSALAForCausalLM
from ..model.machines import DEVICES, GB
from .config import ConvertConfig
from .cost import Part, fits, hours
from .plan import Planned, available_bytes

_WIDTH = 120  # of tables: where they go to a file, narrower ones would cut or wrap their cells


def print_plan(rows: list[Planned], device: torch.device) -> None:
    """Phases with steps, tokens, seconds and memory, on stderr; and whether they fit."""
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "steps", "tokens", "seconds a step", "tokens/s", "expected time", "memory, MiB"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
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
    console = Console(file=sys.stderr, soft_wrap=True, width=_WIDTH)
    console.print(table)
    free, most = available_bytes(device), max((row.memory for row in rows), default=0)
    console.print(
        f"in all {_clock(sum(row.steps * row.seconds for row in rows))}; "
        f"{free / 2**20:,.0f} MiB free on {device}"
        + ("" if most <= free else ", which is too little: lower --micro-tokens, or --recompute"),
        highlight=False,
    )


def cost_table(parts: list[Part], gpus: int, device: str, mfu: float) -> Table:
    """A line for each part of a conversion on GPUs that are not here, memory of one rank, and the total."""
    every = [hours(part, gpus, device, mfu) for part in parts]
    table = Table(
        title=f"{gpus} {device}, {mfu:.0%} of {DEVICES[device].flops / 1e12:,.0f} TFLOP/s; GB of one rank",
        box=None,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        caption="; ".join(
            f"{part.name} does not fit {device}: more GPUs, or fewer --micro-tokens"
            for part in parts
            if not fits(part, device)
        )
        or None,
    )
    for column in ("part", "steps", "tokens", "FLOPs", "states", "gathered", "activations", "GB", "hours"):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for part, took in zip(parts, every, strict=True):
        sizes = (part.states, part.gathered, part.activations, part.memory)
        table.add_row(
            part.name,
            f"{part.steps:,}",
            f"{part.tokens:,}",
            f"{part.flops:.2e}",
            *(f"{size / GB:,.1f}" for size in sizes),
            f"{took:,.2f}",
        )
    total = f"{sum(part.flops for part in parts):.2e}"
    table.add_row("total", "", "", total, "", "", "", "", f"{sum(every):,.2f}")
    return table


def print_cache(config: ConvertConfig, teacher: MiniCPMSALAForCausalLM, folder: Path) -> None:
    """Say what the teacher's states will take on disk, and what is free there, before they are written."""
    tokens = config.distill.steps * config.distill.batch * config.length_of("distill")
    a_token = teacher.config.hidden_size * (2 if config.compute == "bfloat16" else teacher.dtype.itemsize)
    free = shutil.disk_usage(folder).free
    print(
        f"{folder}: the teacher's states of {tokens:,} tokens take up to {tokens * a_token / 1e9:,.2f} GB; "
        f"{free / 1e9:,.2f} GB are free",
        file=sys.stderr,
    )


def print_sweep(record: dict[str, Any], kept: list[int]) -> None:
    """What was measured of each layer, with standard errors over the documents, on stderr."""
    table, errors = Table(box=None, pad_edge=False), record["errors"]
    for column in ("layer", "kept", "recall", "loss", "halo", "kl", "loss of RoPE"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ("recall", "nll", "halo", "kl", "rope")
    values = {**record, "nll": [layer["nll"] for layer in record["layers"]]}
    teacher = record["teacher"]
    table.add_row("teacher", "", f"{teacher['recall']:.3f}", f"{teacher['nll']:.3f}")
    for i in range(len(record["layers"])):
        cells = [f"{values[name][i]:.3f} ± {errors[name][i]:.3f}" for name in shown]
        table.add_row(str(i), "*" if i in kept else "", *cells)
    Console(file=sys.stderr, soft_wrap=True, width=_WIDTH).print(table)


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


def plot_curves(
    curves: dict[str, list[tuple[float, float]]], title: str, labels: tuple[str, str], path: Path
) -> None:
    """Named curves of points above 0, the vertical axis logarithmic; `labels` name the axes."""
    figure, axes = _axes(title, *labels)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)
