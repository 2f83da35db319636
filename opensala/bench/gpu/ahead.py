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
    """Start a process for each group; a run without tests has none, and compiles as it goes."""
    started = context.kept.setdefault("ahead", {})
    for groups in context.sizes.ahead:
        group = groups.partition(",")[0]
        stem = f"{context.stem}.ahead-{group}"
        command = [sys.executable, "-m", "opensala.bench.gpu", "--folder", str(context.folder)]
        command += ["--stem", stem, "--rows", str(context.folder / f"{stem}.csv"), "--only", groups]
        command += ["--start", str(time.time()), "--seconds", str(min(1e6, 2 * context.seconds_left))]
        command += ["--rehearse"] if context.device.torch.type == "cpu" else ["--sizes", "ahead"]
        with context.file(f"ahead-{group}.out").open("w") as log:
            started[group] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def wait(context: Context) -> None:
    """Wait for the processes, and end those that take too long."""
    until = time.time() + min(1e6, max(1.0, PATIENCE * context.seconds_left))
    for group, process in context.kept.pop("ahead", {}).items():
        begun = time.time()
        try:
            process.wait(max(0.1, until - time.time()))
            how = "ended"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            how = "was ended"
        events = read_events(context.file(f"ahead-{group}.jsonl"))
        failed = [e["step"] for e in events if e["event"] == "end" and e["error"]]
        done = sum(e["event"] == "end" for e in events)
        context.report.note(
            f"compiling ahead, {group}: {how} after {done} steps, {time.time() - begun:.0f} s later"
            + (f"; failed in it: {', '.join(failed)}" if failed else "")
        )
        _tidy(context, group, bool(failed) or process.returncode not in (0, -9))


def _tidy(context: Context, group: str, went_wrong: bool) -> None:
    """Its times mean nothing: only what went wrong is kept, in the run's own log."""
    if went_wrong:
        files = [context.file(f"ahead-{group}.{ending}") for ending in ("out", "log")]
        with context.file("log").open("a") as log:
            log.write(f"=== compiling ahead, {group}\n")
            log.writelines(file.read_text()[-20_000:] for file in files if file.exists())
    for ending in ("jsonl", "csv", "log", "out", "profile.txt"):
        context.file(f"ahead-{group}.{ending}").unlink(missing_ok=True)
