"""Pictures of results: score by length, and score by depth and length."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import length_name

_BANDS = 10  # of depth


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'opensala[eval]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def length_curves(curves: dict[str, dict[int, float]], title: str, path: Path) -> None:
    """One line for each name: score (0 to 100) over length, on a logarithmic axis."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    lengths = sorted({n for curve in curves.values() for n in curve})
    markers = "osD^v<>Pp*hXd"
    for i, (name, curve) in enumerate(curves.items()):
        average = name == "average"
        axes.plot(
            sorted(curve),
            [curve[n] for n in sorted(curve)],
            marker=markers[i % len(markers)],
            label=name,
            color="black" if average else plt.get_cmap("tab20")(i % 20),
            linewidth=2.6 if average else 1.3,
            markersize=5,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_name(n) for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.set_xlabel("length in tokens, answer included")
    axes.set_ylabel("score")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_lines(curves: dict[str, dict[int, float]], title: str, path: Path) -> None:
    """One line for each name: a figure above 0 over length, both axes logarithmic."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(sorted(curve), [curve[n] for n in sorted(curve)], marker="o", markersize=5, label=name)
    lengths = sorted({n for curve in curves.values() for n in curve})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [length_name(n) for n in lengths])
    axes.grid(alpha=0.3)
    axes.set_xlabel("length of the prompt in tokens")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def depth_map(rows: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """Score in each tenth of the document and length, one panel a task (tasks are unequally hard: mixed, a
    cell would say which tasks fell into it); False if no row has a depth."""
    cells: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["depth"] is not None:
            cells[row["task"], min(_BANDS - 1, int(row["depth"] * _BANDS)), row["length"]].append(
                row["score"]
            )
    if not cells:
        return False
    plt = _pyplot()
    tasks, lengths = sorted({t for t, _, _ in cells}), sorted({n for _, _, n in cells})
    across = min(4, len(tasks))
    down = -(-len(tasks) // across)
    figure, panels = plt.subplots(
        down,
        across,
        figsize=(1.6 + across * max(1.7, 0.55 * len(lengths)), 0.6 + 2.9 * down),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    colours = plt.get_cmap("RdYlGn").with_extremes(bad="#eeeeee")
    image = None
    for panel, task in zip(panels.flat, tasks, strict=False):
        grid = [
            [100 * sum(c) / len(c) if (c := cells.get((task, band, n))) else float("nan") for n in lengths]
            for band in range(_BANDS)
        ]
        image = panel.imshow(grid, cmap=colours, vmin=0, vmax=100, aspect="auto", alpha=0.7)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    panel.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7)
        count = sum(len(c) for (t, _, _), c in cells.items() if t == task)
        panel.set_title(f"{task} (n={count})", fontsize=8)
        panel.set_xticks(range(len(lengths)), [length_name(n) for n in lengths], fontsize=7)
        panel.set_yticks(
            range(0, _BANDS, 3), [f"{i * 10}-{i * 10 + 10}%" for i in range(0, _BANDS, 3)], fontsize=7
        )
    for panel in panels.flat[len(tasks) :]:
        panel.axis("off")
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("length in tokens", fontsize=9)
    figure.supylabel("depth of the answer in the document", fontsize=9)
    figure.colorbar(image, ax=panels, label="score")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
