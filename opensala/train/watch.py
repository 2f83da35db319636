"""What a training shows: the machine's FLOP/s, progress, TensorBoard, plots. Nothing here decides
anything."""

import importlib.util
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .recipe import Stage


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by tensors, on a CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Board:
    """TensorBoard, if it is installed; otherwise nothing."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def add(self, stage: str, step: int, record: dict[str, Any]) -> None:
        if self._writer is not None:
            for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu"):
                self._writer.add_scalar(f"{stage}/{name}", record[name], step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value with the `width - 1` before it."""
    return [
        sum(values[max(0, n + 1 - width) : n + 1]) / len(values[max(0, n + 1 - width) : n + 1])
        for n in range(len(values))
    ]


def plot_training(
    records: list[dict[str, Any]], stages: Sequence[Stage], probes: dict[str, dict[str, float]], path: Path
) -> None:
    """Loss and learning rate over all tokens, stage by stage, to a PNG; dots are the `probes` before and
    after each stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, rate) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, layout="constrained", height_ratios=(3, 1)
    )
    start = 0.0
    colors = plt.get_cmap("tab10")
    for n, stage in enumerate(stages):
        own = [r for r in records if r["phase"] == stage.name and not r["skipped"]]
        if not own:
            continue
        tokens = [(start + r["tokens"]) / 1e6 for r in own]
        values = [r["loss"] for r in own]
        loss.plot(tokens, values, color=colors(n % 10), alpha=0.25, linewidth=0.8)
        loss.plot(
            tokens,
            smoothed(values, max(1, len(values) // 8)),
            color=colors(n % 10),
            linewidth=1.8,
            alpha=0.8,
            label=f"{stage.name}: {stage.sequence:,} tokens, {'sparse' if stage.sparse else 'dense'}",
        )
        rate.plot(tokens, [r["lr"] for r in own], color=colors(n % 10))
        probe = probes.get(stage.name, {})
        if "after" in probe:
            loss.plot(
                [start / 1e6, tokens[-1]],
                [probe["before"], probe["after"]],
                "o-",
                color="black",
                linewidth=0.8,
                markersize=4,
                zorder=3,
            )
        start += own[-1]["tokens"]
    loss.set_ylabel("loss (nats a target token)")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("million tokens")
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    loss.legend(fontsize=8, frameon=False, ncols=2)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    plt.close(figure)
    partial.replace(path)
