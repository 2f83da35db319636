"""Commands that are run one after the other in a folder: what each printed, how long it took, and a mark for
those that are done, so that the same command goes on from there. It knows nothing of what they compute.
"""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

GRACE = 10.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; None if it was ended because it took longer than its limit.
        seconds: by the clock.
        processor_seconds: of all threads, children that it waited for included.
    """

    code: int | None
    seconds: float
    processor_seconds: float


def package_command(*arguments: object) -> tuple[str, ...]:
    """The command line of this package, in this Python."""
    return (sys.executable, "-m", "opensala", *map(str, arguments))


def run_process(
    command: Sequence[str],
    output: IO[str],
    errors: IO[str] | None = None,
    *,
    limit: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Ended:
    """Run a process to its end.

    Args:
        command: what to run.
        output: where its stdout goes.
        errors: where its stderr goes; None for where its stdout does.
        limit: seconds after which it, and what it started, is ended.
        environment: variables beside those of this process.
        folder: where it runs; here by default.
    """
    before, start = _children(), time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT if errors is None else errors,
        env={**os.environ, **(environment or {})},
        cwd=folder,
        start_new_session=True,  # so that a server it started ends with it
    )
    code: int | None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        _end(process)
        code = None
    except BaseException:  # Ctrl-C reaches this process only: the other one has a session of its own
        _end(process)
        raise
    return Ended(code, time.monotonic() - start, _children() - before)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all of its session, gently first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def done_before(directory: Path, name: str, command: Sequence[str]) -> dict[str, Any] | None:
    """What `mark_done` kept of a step; None if it was not done.

    Raises:
        ValueError: it was done with another command (another Python is no other command).
    """
    mark = directory / "done" / f"{name}.json"
    if not mark.exists():
        return None
    record: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
    if record["command"][1:] != list(command)[1:]:
        raise ValueError(
            f"{name} was done in {directory} by another command ({shlex.join(record['command'])}): "
            "take another folder, or give the options of then"
        )
    return record


def mark_done(directory: Path, name: str, command: Sequence[str], ended: Ended, **more: Any) -> None:
    """Note that a step is done, whole or not at all."""
    record = {
        "command": list(command),
        "seconds": round(ended.seconds, 1),
        "processor_seconds": round(ended.processor_seconds, 1),
        **more,
    }
    mark = directory / "done" / f"{name}.json"
    mark.parent.mkdir(exist_ok=True)
    partial = mark.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(mark)
