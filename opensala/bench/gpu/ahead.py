"""Compiling ahead: while the tests run, another process calls the kernels on short texts.

What it compiles lies in Triton's cache on disk, so that the steps that are timed find it there. Nothing is
timed while it runs: the kernels begin when it has ended, or is ended.
"""

import subprocess
import sys
import time

from .steps import Context, Step, read_events
from .tests import ROOT

PATIENCE = 0.35  # of the time of the kernels, until it is ended


def begin() -> Step:
    return Step("compile ahead", "tests", 5, start)


def end() -> Step:
    return Step("compiled ahead", "kernels", 0, wait)


def start(context: Context) -> None:
    """Start the process; a run without tests has none, and compiles as it goes."""
    stem = f"{context.stem}.ahead"
    command = [sys.executable, "-m", "opensala.bench.gpu", "--folder", str(context.folder), "--stem", stem]
    command += ["--rows", str(context.folder / f"{stem}.csv"), "--only", ",".join(context.sizes.ahead)]
    command += ["--start", str(time.time()), "--seconds", str(min(1e6, 2 * context.seconds_left))]
    command += ["--rehearse"] if context.device.torch.type == "cpu" else ["--sizes", "ahead"]
    with context.file("ahead.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    context.kept["ahead"] = process


def wait(context: Context) -> None:
    """Wait for the process, and end it if that takes too long."""
    process = context.kept.pop("ahead", None)
    if process is None:
        return
    begun = time.perf_counter()
    try:
        process.wait(min(1e6, max(1.0, PATIENCE * context.seconds_left)))
        how = "ended"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        how = "was ended"
    events = read_events(context.file("ahead.jsonl"))
    failed = [e["step"] for e in events if e["event"] == "end" and e["error"]]
    done = sum(e["event"] == "end" for e in events)
    for ending in ("ahead.jsonl", "ahead.csv", *([] if failed else ["ahead.log"])):  # its times mean nothing
        context.file(ending).unlink(missing_ok=True)
    context.report.note(
        f"compiling ahead {how} after {done} steps, {time.perf_counter() - begun:.0f} s behind the tests"
        + (f"; failed in it: {', '.join(failed)}" if failed else "")
    )
