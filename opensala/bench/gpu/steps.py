"""One step after the other: within its time, its failure its own, what it found on disk at once.

A step is a function of a `Context`. What happens is written as events, a JSON object a line, into one file:
`begin` and `end` of steps, `skip`, `row`, `note`. A process that dies is followed by another that goes on
behind the last step begun.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..record import MEASURED, Report, append_rows
from .device import Device
from .sizes import Sizes

Event = dict[str, Any]
SICK = 75  # exit code of a process whose device computes no more, with steps left
GROUPS = {"ceilings": 8, "tests": 30, "kernels": 27, "model": 16, "million": 19}  # shares of the time
OPTIONAL = {"dense": 30, "large": 40, "sanitizer": 20, "counters": 20}  # only when they are named


@dataclass(frozen=True)
class Step:
    """A step: its name, its group, the seconds without which it is not begun, and what it does."""

    name: str
    group: str
    seconds: float
    run: Callable[["Context"], None]


class Live(Report):
    """A report whose rows and notes are on disk as soon as they exist."""

    def __init__(self, device: Device, events: Path, rows: Path) -> None:
        super().__init__(device.torch)
        self.events, self.csv = events, rows

    def write(self, event: Event) -> None:
        with self.events.open("a") as file:
            file.write(json.dumps({**event, "at": round(time.time(), 2)}) + "\n")

    def keep(self, row: dict[str, Any]) -> None:
        super().keep(row)
        self.write({"event": "row", "row": row})
        append_rows(self.csv, [*MEASURED, *self.machine], [row | self.machine])

    def note(self, text: str) -> None:
        super().note(text)
        self.write({"event": "note", "text": text})


@dataclass
class Context:
    """What steps share.

    Attributes:
        until: the time (as of `time.time`) at which the step's group has to be done.
        folder: where files of the run belong.
        stem: how their names begin.
        kept: what one step leaves for later ones (the model).
    """

    device: Device
    report: Live
    sizes: Sizes
    folder: Path
    stem: str
    until: float = float("inf")
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.until - time.time()

    def file(self, ending: str) -> Path:
        """A file of this run, `STEM.ENDING`."""
        return self.folder / f"{self.stem}.{ending}"


def read_events(path: Path) -> list[Event]:
    """What happened so far; a last line that was cut off is left out."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def group_ends(groups: Sequence[str], start: float, seconds: float) -> dict[str, float]:
    """When each of these groups has to be done, of a run of `seconds` from `start`: by shares, in order.

    The ceilings, which everything is compared with, are run whatever their time is.
    """
    shares = {**GROUPS, **OPTIONAL}
    total, passed, ends = sum(shares[g] for g in groups), 0.0, {}
    for group in groups:
        passed += shares[group]
        ends[group] = start + seconds * (1 if group == "ceilings" else passed / total)
    return ends


def run_steps(steps: Iterable[Step], context: Context, ends: Mapping[str, float]) -> bool:
    """Run the steps that fit, in order, but those that were begun before.

    Returns:
        False if the device computes no more: the rest is for another process.
    """
    report = context.report
    over = {e["step"] for e in read_events(report.events) if e["event"] in ("begin", "skip")}
    for step in steps:
        if step.name in over:
            continue
        context.until = ends[step.group]
        if context.seconds_left < step.seconds:
            why = f"{step.seconds:.0f} s are wanted, {max(0.0, context.seconds_left):.0f} are left"
            report.say(f"{step.name}: skipped, {why}")
            report.write({"event": "skip", "step": step.name, "why": why})
            continue
        # A step that hangs is ended from outside, by this time; one that is only late may go on for a while.
        limit = min(max(ends.values()), time.time() + max(60, 4 * step.seconds, context.seconds_left))
        report.write({"event": "begin", "step": step.name, "limit": min(limit, 1e12)})
        error = _run(step, context)
        report.write({"event": "end", "step": step.name, "error": error})
        context.device.release()
        if error is not None and not context.device.is_well():
            report.say("the device computes no more: a new process goes on")
            return False
    return True


def _run(step: Step, context: Context) -> str | None:
    """Run a step; its failure in one line, with the traceback in the log."""
    report, start = context.report, time.perf_counter()
    report.say(f"{step.name} (until {max(0.0, min(1e6, context.seconds_left)):.0f} s from now)")
    try:
        step.run(context)
    except Exception as failure:  # whatever it is: it is recorded, and the next step goes on
        text = str(failure).strip()
        first = text.splitlines()[0] if text else ""
        error = f"{type(failure).__name__}: {first}"[:500]
        with context.file("log").open("a") as log:
            log.write(f"--- {step.name}\n{traceback.format_exc()}\n")
        report.say(f"  FAILED: {error}")
        return error
    report.say(f"  {time.perf_counter() - start:.1f} s")
    return None
