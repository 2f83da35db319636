"""The comparison: lengths from short to long, contenders piece by piece in turn, a row for each of both.

A contender that has no memory for a length has a row that says so; one that would take longer than the limit
is left out, with the time that its pieces so far let expect: a piece costs a constant and a share of what
lies before it.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...engine.memory import available_bytes
from ..record import Report, append_rows, significant
from ..roofline import measure_roofline
from ..timing import quantiles
from .gguf_twin import write_twin
from .llama_setup import find_python
from .parts import share_rows
from .presets import LENGTHS, K, Preset, dense_bytes, preset
from .process import CONTENDERS, Contender, Process
from .table import plot, show
from .targets import targets_of

PIECE = 4096
ROUNDS = 4  # of decoding, in turn
END_TO_END = 1024  # tokens generated in the end-to-end figure
COLUMNS = (
    *("preset", "contender", "weights", "tokens", "first_s", "step_p20_ms", "step_p50_ms", "step_p80_ms"),
    *("generated", "end_to_end_s", "peak_mib", "cache_mib", "status"),
)
_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "F16": 2.0,
    "Q8_0": 1.0625,
    "Q4_0": 0.5625,
    "int8": 1.25,
    "int4": 0.75,
}


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        preset: see `presets.preset`.
        lengths: tokens of prompts; empty for those of the device.
        contenders: names of `process.CONTENDERS`; empty for all that can run here.
        generate: tokens generated behind each prompt.
        limit: seconds that reading one prompt may be expected to take.
        device: `auto`, `cpu` or `cuda`.
        llama: a Python that has llama.cpp.

    Raises:
        ValueError: an unknown name, a number out of its range.
    """

    preset: str = "135m"
    lengths: tuple[int, ...] = ()
    contenders: tuple[str, ...] = ()
    generate: int = 32
    limit: float = 1800.0
    device: str = "auto"
    llama: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.contenders if name not in CONTENDERS]
        if unknown:
            raise ValueError(f"--against must name some of {', '.join(CONTENDERS)}, got {unknown[0]!r}")
        if any(n < 64 for n in self.lengths):
            raise ValueError(f"--lengths must be at least 64 tokens, got {min(self.lengths)}")
        if self.generate < ROUNDS:
            raise ValueError(f"--generate must be at least {ROUNDS}, got {self.generate}")


@dataclass
class _Reading:
    """What is known of a contender's pieces: (tokens before, tokens, seconds)."""

    pieces: list[tuple[int, int, float]] = field(default_factory=list)

    def expected(self, tokens: int) -> float:
        """Seconds of a prompt, from the least-squares line through the time per token of its pieces."""
        if not self.pieces:
            return 0.0
        at = [before + count / 2 for before, count, _ in self.pieces]
        per_token = [seconds / count for _, count, seconds in self.pieces]
        mean, level = sum(at) / len(at), sum(per_token) / len(at)
        spread = sum((a - mean) ** 2 for a in at)
        slope = sum((a - mean) * (y - level) for a, y in zip(at, per_token, strict=True)) / max(spread, 1e-9)
        slope = max(0.0, slope)
        return max(0.0, (level - slope * mean) * tokens + slope * tokens**2 / 2)


def run(options: Options, rows: Path, plots: Path | None = None) -> Report:
    """Compare, append the rows to a CSV file, print table and targets; the last line on stdout is JSON.

    Raises:
        ValueError: see `Options`; a contender that cannot run here or failed; a file of other columns.
    """
    shapes = preset(options.preset)
    device = _device(options.device)
    report = Report(device)
    report.say(" | ".join(f"{name} {value}" for name, value in report.machine.items() if value))
    chosen = _chosen(report, options, device)
    lengths = sorted(options.lengths or LENGTHS[device.type])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started = _start(stack, shapes, chosen, device, Path(folder), options)
        report.notes += [f"{p.contender.name}: {p.said.get('dtype', '')}" for p in started.values()]
        roofline = measure_roofline(report, quick=device.type == "cpu")
        report.rows.clear()  # said, and in the targets; the file has rows of another kind
        readings = {name: _Reading() for name in started}
        for tokens in lengths:
            _measure(report, shapes, started, readings, tokens, options)
        share_rows(report, shapes, started, [n for n in lengths if n <= 64 * K], roofline)
    report.targets = targets_of(report.rows, shapes, roofline)
    append_rows(rows, [*COLUMNS, *report.machine], [_of_columns(row) | report.machine for row in report.rows])
    show(report)
    if plots is not None:
        plot(report.rows, plots)
    report.show_targets()
    print(report.as_json())
    return report


def _of_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in COLUMNS}


def _device(name: str) -> torch.device:
    gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not gpu):
        here = "a" if gpu else "no"
        raise ValueError(f"--device must be auto, cpu or cuda (there is {here} CUDA GPU here), got {name!r}")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def _chosen(report: Report, options: Options, device: torch.device) -> list[Contender]:
    """The contenders asked for, or all that can run here; what cannot is said."""
    names = options.contenders or tuple(CONTENDERS)
    python = find_python(options.llama)
    if python is None and any(CONTENDERS[n].kind == "llama" for n in names):
        text = "llama.cpp is not here: `opensala bench llama-cpp` builds it"
        if options.contenders:
            raise ValueError(text)
        report.note(text)
    found = []
    for name in names:
        contender = CONTENDERS[name]
        on_gpu = contender.weights == "bfloat16" and contender.kind != "llama"
        if (contender.kind == "llama" and python is None) or (device.type == "cuda" and not on_gpu):
            continue
        found.append(contender)
    return found


def _start(
    stack: ExitStack,
    shapes: Preset,
    chosen: Sequence[Contender],
    device: torch.device,
    folder: Path,
    options: Options,
) -> dict[str, Process]:
    started: dict[str, Process] = {}
    for contender in chosen:
        file = None
        if contender.kind == "llama":
            file = folder / f"{contender.weights}.gguf"
            write_twin(shapes.dense, contender.weights, file)
        process = Process(contender, shapes.name, device.type, torch.get_num_threads(), file, options.llama)
        stack.callback(process.kill)
        started[contender.name] = process
    return started


def _measure(
    report: Report,
    shapes: Preset,
    started: dict[str, Process],
    readings: dict[str, _Reading],
    tokens: int,
    options: Options,
) -> None:
    """Rows of one length: all contenders read it piece by piece in turn, then generate in turn."""
    active: dict[str, Process] = {}
    for name, process in started.items():
        reason = _left_out(shapes, process, readings[name], tokens, options)
        if not reason:
            process.ask("start", tokens=tokens, new=options.generate)
            reason = process.oom and f"OOM ({process.oom})"
        if reason:
            _keep(report, shapes, process.contender, tokens, status=reason)
        else:
            active[name] = process
    seconds = dict.fromkeys(active, 0.0)
    with _bar(f"{tokens:,} tokens", len(active) * -(-tokens // PIECE)) as advance:
        for before in range(0, tokens, PIECE):
            count = min(PIECE, tokens - before)
            for name, process in active.items():
                if not process.oom:
                    spent = process.ask("read", count=count).get("seconds", 0.0)
                    readings[name].pieces.append((before, count, spent))
                    seconds[name] += spent
                advance()
    steps = _decode(active, options.generate)
    for name, process in active.items():
        ended = process.ask("end", tokens=tokens)
        if process.oom:
            _keep(report, shapes, process.contender, tokens, status=f"OOM ({process.oom})")
            continue
        _keep(report, shapes, process.contender, tokens, seconds[name], steps[name], ended)


def _left_out(shapes: Preset, process: Process, reading: _Reading, tokens: int, options: Options) -> str:
    """Why a contender does not read a prompt of this length, or ''."""
    if process.oom:
        return f"OOM ({process.oom})"
    expected = reading.expected(tokens)
    if expected > options.limit:
        return f"left out: about {expected:,.0f} s"
    contender = process.contender
    if contender.kind != "hybrid":
        needed = dense_bytes(shapes.dense, tokens, _BYTES[contender.weights])
        free = available_bytes(torch.device("cpu" if options.device != "cuda" else "cuda"))
        if needed > free:
            return f"OOM (needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free)"
    return ""


def _decode(active: dict[str, Process], count: int) -> dict[str, list[float]]:
    steps: dict[str, list[float]] = {name: [] for name in active}
    for process in active.values():  # the first step of a length may prepare what later ones reuse
        process.ask("decode", count=1)
    for _ in range(ROUNDS):
        for name, process in active.items():
            steps[name] += process.ask("decode", count=max(1, count // ROUNDS - 1)).get("seconds", [])
    return steps


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr while the block runs; yields what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def _keep(
    report: Report,
    shapes: Preset,
    contender: Contender,
    tokens: int,
    first: float | None = None,
    steps: list[float] | None = None,
    ended: dict[str, Any] | None = None,
    status: str = "measured",
) -> None:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"preset": shapes.name, "contender": contender.name, "weights": contender.weights}
    row |= {"tokens": tokens, "status": status}
    if first is not None and steps and ended is not None:
        timing = quantiles(steps)
        row |= {
            "first_s": significant(first),
            "step_p20_ms": significant(timing.p20 * 1e3),
            "step_p50_ms": significant(timing.p50 * 1e3),
            "step_p80_ms": significant(timing.p80 * 1e3),
            "generated": len(steps),
            "end_to_end_s": significant(first + (END_TO_END - 1) * timing.p50),
            "peak_mib": round(ended["peak"] / 2**20),
            "cache_mib": significant(ended["cache"] / 2**20),
        }
    report.rows.append(row)
    figures = (
        f"first token {row['first_s']} s, {row['step_p50_ms']} ms a token" if first is not None else status
    )
    report.say(f"  {contender.name}, {tokens:,} tokens: {figures}")
