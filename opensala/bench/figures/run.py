"""The steps carried out, one process at a time, and every figure of the documents beside what they measured.

A finished step is not run again; one that cannot run here is left out, one that fails is recorded, and the
next one goes on. `FOLDER/done/STEP.json` has the rows of a step and how long it took, `FOLDER/logs/` what it
said, `FOLDER/figures.csv` and `FOLDER/figures.md` the figures.
"""

import csv
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ...runs import done_before, mark_done, run_process
from ..record import describe, significant
from .needs import lacking
from .plan import Measurement, plan, work_folder
from .registry import ROOT, Registry, Row, read_registry
from .restate import restate


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        folder: of all files.
        only: names of steps; empty for all.
        again: whether finished steps are run again.
        smoke: tiny sizes.
        threads: of steps that do not say.
        gguf: the base's GGUF file, for steps that need it.
        write: whether documents and registry are brought to what was measured, at the end.
    """

    folder: Path
    only: tuple[str, ...] = ()
    again: bool = False
    smoke: bool = False
    threads: int = 2
    gguf: str = ""
    write: bool = False


@dataclass(frozen=True)
class Line:
    """A figure of a document, and what was measured."""

    document: str
    text: str
    stated: str
    measured: float | None
    over_stated: float | None
    step: str
    status: str


@dataclass
class Outcome:
    """How a step went: `measured`, or why there are no rows."""

    status: str
    rows: Sequence[Row] = ()


def chosen(steps: Sequence[Measurement], only: Sequence[str]) -> list[Measurement]:
    """The steps of these names, in their order.

    Raises:
        ValueError: an unknown name.
    """
    names = [step.name for step in steps]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"--only must name some of {', '.join(names)}, got {unknown[0]!r}")
    return [step for step in steps if not only or step.name in only]


def run(options: Options, say: Callable[[str], None], registry: Registry | None = None) -> bool:
    """Carry the steps out and write the figures; whether no step failed.

    Raises:
        ValueError: an unknown step; a step that was done in this folder by another command; tiny sizes whose
            figures should be written into documents.
    """
    if options.write and options.smoke:
        raise ValueError("--write puts figures into the documents, and those of --smoke mean nothing")
    registry = registry or read_registry()
    folder = options.folder.resolve()
    steps = plan(folder, options.gguf)
    wanted = chosen(steps, options.only)
    folder.mkdir(parents=True, exist_ok=True)
    if not options.again:
        for step in wanted:  # refused before hours of work, not behind them
            done_before(folder, step.name, _command(step, options))
    outcomes = {step.name: Outcome("not run") for step in steps}
    for step in steps:
        if step not in wanted and (found := _kept(folder, step, options)):
            outcomes[step.name] = found
    for number, step in enumerate(wanted, 1):
        say(
            f"{number}/{len(wanted)} {step.name}: about {step.minutes:g} minutes"
            if not options.smoke
            else step.name
        )
        outcomes[step.name] = outcome = carry_out(folder, step, options)
        say(f"  {outcome.status}")
    lines = [line for figure in registry.figures for line in [_line(figure, outcomes)]]
    write(folder, lines, registry, options.smoke)
    if options.write:
        changed, left = restate({name: outcome.rows for name, outcome in outcomes.items() if outcome.rows})
        say(f"{changed} numbers changed in documents and registry: read what the sentences say of them")
        for text in left:
            say(f"left as it was: {text}")
    failed = [step.name for step in wanted if outcomes[step.name].status.startswith("failed")]
    if failed:
        say(f"failed: {', '.join(failed)}; their output is in {folder / 'logs'}")
    return not failed


def _command(step: Measurement, options: Options) -> tuple[str, ...]:
    return step.smoke if options.smoke else step.command


def _kept(folder: Path, step: Measurement, options: Options) -> Outcome | None:
    """What a step that is not wanted this time had found before, if by this command."""
    try:
        record = done_before(folder, step.name, _command(step, options))
    except ValueError:
        return None
    return None if record is None else Outcome("measured before", record["rows"])


def carry_out(folder: Path, step: Measurement, options: Options) -> Outcome:
    """Run a step to its end, unless it was done before or cannot run here."""
    command = _command(step, options)
    if not options.again:
        record = done_before(folder, step.name, command)
        if record is not None:
            return Outcome("measured before", record["rows"])
    reason = lacking(step.needs, options.gguf)
    if reason:
        return Outcome(f"left out: {reason}")
    logs, work = folder / "logs", work_folder(folder, step.name)
    logs.mkdir(exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)  # of a step that was stopped, or is run again
    work.mkdir(parents=True)
    paths = logs / f"{step.name}.out", logs / f"{step.name}.log"
    environment = {"OMP_NUM_THREADS": str(step.threads or options.threads)}
    with open(paths[0], "w", encoding="utf-8") as output, open(paths[1], "w", encoding="utf-8") as errors:
        print(f"$ {shlex.join(command)}", file=errors, flush=True)
        ended = run_process(command, output, errors, limit=step.limit, environment=environment, folder=folder)
    if ended.code is None:
        return Outcome(f"failed: ended after {step.limit / 60:.0f} minutes")
    if ended.code:
        return Outcome(f"failed: exit code {ended.code}, {_last_line(paths[1])}")
    rows = read_rows(paths[0])
    rows.append({"what": "process", "seconds": ended.seconds, "processor_seconds": ended.processor_seconds})
    shutil.rmtree(work)
    mark_done(folder, step.name, command, ended, rows=rows, time=time.strftime("%Y-%m-%d %H:%M"))
    return Outcome("measured", rows)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200]


def read_rows(path: Path) -> list[Row]:
    """Rows and targets of the JSON that is the last line of a step's output; none if it is no JSON."""
    last = ([""] + path.read_text(encoding="utf-8").strip().splitlines())[-1]
    if not last.startswith("{"):
        return []
    found: dict[str, Any] = json.loads(last)
    return [*found.get("rows", []), *found.get("targets", [])]


def _line(figure: Any, outcomes: dict[str, Outcome]) -> Line:
    outcome = outcomes[figure.step]
    value, status = figure.value(outcome.rows), outcome.status
    if value is None and outcome.rows:
        status = "no such row"
    measured = None if value is None else significant(value)
    over = None if value is None or not figure.number else significant(value / figure.number)
    return Line(figure.document, figure.text, figure.stated, measured, over, figure.step, status)


def write(folder: Path, lines: Sequence[Line], registry: Registry, smoke: bool) -> None:
    """The figures as CSV and as Markdown."""
    with open(folder / "figures.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Line)])
        writer.writerows([["" if x is None else x for x in vars(line).values()] for line in lines])
    (folder / "figures.md").write_text(page(lines, registry, smoke), encoding="utf-8")


def page(lines: Sequence[Line], registry: Registry, smoke: bool) -> str:
    """Markdown: every figure as stated beside the value just measured, then those that no step gives."""
    machine = ", ".join(f"{k} {v}" for k, v in describe(torch.device("cpu")).items() if v)
    parts = ["# Figures of speed, measured again", machine]
    if smoke:
        parts.append("**A run at tiny sizes: its figures mean nothing.**")
    parts.append(
        "| document | line | stated | measured | over stated | step | |\n|---|---|---:|---:|---:|---|---|"
    )
    for line in lines:
        value = "" if line.measured is None else f"{line.measured:g}"
        ratio = "" if line.over_stated is None else f"{line.over_stated:.2f}"
        cells = [line.document, _cell(line.text), line.stated, value, ratio, line.step, line.status]
        parts[-1] += f"\n| {' | '.join(cells)} |"
    parts.append("Not by these steps:")
    parts.append(
        "\n".join(
            f"- {e.document}, {_cell(e.text or e.table)}: {e.reason}, {e.why}" for e in registry.elsewhere
        )
    )
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", " ").split())


def listing(options: Options, registry: Registry | None = None) -> str:
    """Name, expected minutes, documents and command of every step, and what it lacks here."""
    registry = registry or read_registry()
    parts = []
    for step in chosen(plan(options.folder.resolve(), options.gguf), options.only):
        documents = registry.documents(step.name)
        count = len(registry.of_step(step.name))
        command = shlex.join(["python", *_command(step, options)[1:]]).replace(f"{ROOT}/", "")
        reason = lacking(step.needs, options.gguf)
        lines = [
            f"{step.name}: {step.minutes:g} minutes, {count} figures of {', '.join(documents) or 'none'}"
        ]
        lines += [f"  {command}", *([f"  would be left out: {reason}"] if reason else [])]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
