"""Test the GPU kernels, time them and the whole model, and write the report: what `make gpu` runs, on any
machine with torch, Triton and a CUDA GPU.

    python scripts/gpu.py [--output benchmarks] [--seconds 600] [--only kernels,model] [--rehearse]

The order is: ceilings, tests, kernels, model, million. Each has a share of the time; what no longer fits is
left out, and said. Rows are added to OUTPUT/results.csv as they come; OUTPUT/reports/ gets, under one name,
the page (.md), all events (.jsonl), tracebacks (.log), the tests' log (.tests.log) and the profiler's tables
(.profile.txt). `--only` also takes dense, large, sanitizer and counters, which do not run by themselves.
A step that fails is recorded and the next one goes on; the exit code is then 1. 2: nothing was run.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from opensala.bench.gpu.outcome import page, result_of, slug  # noqa: E402
from opensala.bench.gpu.plan import groups_of  # noqa: E402
from opensala.bench.gpu.sizes import TINY, Sizes  # noqa: E402
from opensala.bench.gpu.steps import SICK, read_events  # noqa: E402

GRACE = 10.0  # seconds that a step may be late before its process is ended
NEEDED = ("transformers", "safetensors", "numpy", "rich", "psutil", "pypdf", "triton", "pytest")


def watch(process: subprocess.Popen, events: Path, end: float) -> int | None:
    """Wait for a process of the run; ends it when a step is far beyond its time. None: it had to be ended."""
    while True:
        try:
            return process.wait(0.5)
        except subprocess.TimeoutExpired:
            last = [e for e in read_events(events) if e["event"] in ("begin", "end", "skip")][-1:]
            limit = last[0]["limit"] if last and last[0]["event"] == "begin" else end
            if time.time() > min(limit, end) + GRACE:
                process.kill()
                process.wait()
                return None


def run_processes(command: list[str], events: Path, end: float, variables: dict[str, str]) -> None:
    """One process after the other, each going on behind the step that ended the one before it."""
    while True:
        before = len(read_events(events))
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": _path()} | variables)
        try:
            code = watch(process, events, end)
        except BaseException:
            process.kill()
            raise
        if code == 0 or time.time() > end:
            return
        what = "was ended: a step took too long" if code is None else f"ended with exit code {code}"
        if code != SICK:
            print(f"gpu.py: the process {what}", file=sys.stderr, flush=True)
        begun = [e for e in read_events(events)[before:] if e["event"] == "begin"]
        if not begun:  # it would fail again in the same way
            return


def _path() -> str:
    """PYTHONPATH of the run's processes: this checkout before whatever it was."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def main(
    output: Annotated[Path, typer.Option(help="Folder of rows and reports.")] = ROOT / "benchmarks",
    seconds: Annotated[float, typer.Option(min=1, help="How long it may take in all.")] = 600,
    only: Annotated[str, typer.Option(help="Groups of steps to run, by commas.")] = "",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same at tiny sizes, on the CPU in Triton's interpreter.")
    ] = False,
) -> None:
    start = time.time()
    try:
        groups = groups_of(only)
    except ValueError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if not rehearse and not torch.cuda.is_available():
        print(
            "gpu.py: torch sees no CUDA GPU here; --rehearse runs the same on the CPU (as make test does)",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu.py: not installed: {', '.join(missing)}; steps that need them will fail", file=sys.stderr)
    device = "rehearsal" if rehearse else torch.cuda.get_device_name()
    stem = f"kernels_{slug(device)}_{time.strftime('%Y-%m-%d_%H%M%S')}"
    folder = output.resolve() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "opensala.bench.gpu", "--folder", str(folder), "--stem", stem]
    command += ["--rows", str(output.resolve() / "results.csv"), "--only", ",".join(groups)]
    command += ["--start", str(start), "--seconds", str(seconds), *(["--rehearse"] if rehearse else [])]
    events = folder / f"{stem}.jsonl"
    run_processes(command, events, start + seconds, {"TRITON_INTERPRET": "1"} if rehearse else {})
    result = result_of(read_events(events), TINY if rehearse else Sizes())
    (folder / f"{stem}.md").write_text(page(result, f"Kernels on {device}"))
    for step, why in result["skipped"]:
        print(f"left out: {step}: {why}")
    for line in result["tests"]:
        print(f"tests: {line}")
    for target in result["targets"]:
        met = "met" if target["ok"] else "MISSED"
        print(f"{met}: {target['name']}: {target['value']:g} ({target['target']:g})")
    for step, error in result["failed"]:
        print(f"FAILED: {step}: {error}")
    print(f"{len(result['rows'])} rows, {folder / stem}.md, {time.time() - start:.0f} s in all", flush=True)
    if result["failed"] or not result["rows"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
