"""What measurements leave behind: rows with the machine and versions on each, targets, a table, a CSV file,
JSON.

It knows nothing of what was measured.
"""

import csv
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..ops.native.processor import processor_features, processor_name
from .timing import Timing

MEASURED = (
    "op",
    "pass",
    "backend",
    "dtype",
    "shape",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "runs",
    "gflops",
    "gbs",
    "peak_mib",
    "precision",
)


@dataclass(frozen=True)
class Target:
    """A figure asked for, and what came out; `ok` when the value reaches it."""

    name: str
    value: float
    target: float
    ok: bool

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> "Target":
        return cls(name, round(value, 4), limit, value <= limit)

    @classmethod
    def at_least(cls, name: str, value: float, limit: float) -> "Target":
        return cls(name, round(value, 4), limit, value >= limit)


@dataclass
class Report:
    """Rows and targets of one run on one machine."""

    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = describe(self.device)
        self.console = Console(stderr=True)

    def add(
        self,
        op: str,
        backend: str,
        timing: Timing,
        *,
        shape: str,
        dtype: torch.dtype = torch.float32,
        kind: str = "forward",
        flops: float = 0,
        moved: float = 0,
        peak: float | None = None,
        precision: str = "",
    ) -> None:
        """Keep a row and show it. `flops`: operations of a call; `moved`: bytes; `peak`: bytes of memory;
        `precision`: of a model, what `engine.precision_of` says."""
        row = {
            "op": op,
            "pass": kind,
            "backend": backend,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": shape,
            "p20_ms": significant(timing.p20 * 1e3),
            "p50_ms": significant(timing.p50 * 1e3),
            "p80_ms": significant(timing.p80 * 1e3),
            "runs": timing.runs,
            "gflops": significant(flops / timing.p50 / 1e9) if flops else "",
            "gbs": significant(moved / timing.p50 / 1e9) if moved else "",
            "peak_mib": "" if peak is None else round(peak / 2**20),
            "precision": precision,
        }
        self.keep(row)
        rates = [
            f"{row['gflops']} GFLOP/s" if flops else "",
            f"{row['gbs']} GB/s" if moved else "",
            f"peak {row['peak_mib']} MiB" if peak is not None else "",
        ]
        self.say(
            f"  {op} {kind}, {backend}, {shape}: {row['p50_ms']} ms ({row['p20_ms']} ... {row['p80_ms']}, "
            f"{timing.runs} runs) " + ", ".join(r for r in rates if r)
        )

    def keep(self, row: dict[str, Any]) -> None:
        """What becomes of a new row."""
        self.rows.append(row)

    def note(self, text: str) -> None:
        """Keep and show something a reader of the figures should know."""
        self.notes.append(text)
        self.say(f"  note: {text}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def append_to(self, path: Path) -> None:
        """Add the rows to a CSV file, which gets a header if it is new.

        Raises:
            ValueError: the file has other columns.
        """
        append_rows(path, [*MEASURED, *self.machine], [row | self.machine for row in self.rows])

    def show_targets(self) -> None:
        table = Table(box=None, pad_edge=False)
        for column in ("target", "value", "asked", ""):
            table.add_column(column)
        for t in self.targets:
            table.add_row(t.name, f"{t.value:g}", f"{t.target:g}", "met" if t.ok else "MISSED")
        self.console.print(table)

    def as_json(self) -> str:
        return json.dumps(
            {
                "rows": self.rows,
                "targets": [asdict(t) for t in self.targets],
                "notes": self.notes,
                "machine": self.machine,
            }
        )


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file of these columns, which gets a header if it is new.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != list(columns):
            raise ValueError(
                f"{path} has the columns {', '.join(header)}, not {', '.join(columns)}: name another "
                "file with --rows"
            )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows as one line of JSON on stdout, the last one of a script that measures."""
    print(json.dumps({"rows": rows}), flush=True)


def significant(x: float) -> float:
    """Four significant digits."""
    return float(f"{x:.4g}")


def describe(device: torch.device) -> dict[str, str]:
    """Machine, threads, versions, commit and time, as they go on every row."""
    threads = torch.get_num_threads()
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "machine": machine,
        "features": " ".join(processor_features()),
        "threads": str(threads),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fla": version("flash-linear-attention"),
        "opensala": version("opensala"),
        "commit": commit(),
        "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Short hash of the checkout the package lies in, with a + if files were changed; empty outside a
    checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def run(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    return run("rev-parse", "--short", "HEAD") + (
        "+" if run("status", "--porcelain", "--untracked-files=no") else ""
    )
