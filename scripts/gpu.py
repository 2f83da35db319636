"""Test the GPU kernels, time them and the whole model, and write the report: what `make gpu` runs, on any
machine with torch, Triton and a CUDA GPU.

    python scripts/gpu.py [--output benchmarks] [--seconds 600] [--only kernels,model] [--rehearse]

The order is: ceilings, tests, kernels, model, million. Each has a share of the time; what no longer fits is
left out, and said. Rows are added to OUTPUT/results.csv as they come; OUTPUT/reports/ gets, under one name,
the page (.md), all events (.jsonl), tracebacks (.log), the tests' log (.tests.log) and the profiler's tables
(.profile.txt). docs/gpu.md is made anew with these rows; if OUTPUT is another folder than this repository's,
such a page lies beside the others (.ledger.md). `--only` also takes dense (Qwen3-8B's shape), large (tests of
60 GiB), sanitizer and counters (NVIDIA's tools), which do not run by themselves.
A step that fails is recorded and the next one goes on; the exit code is then 1. 2: nothing was run.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(
    0, str(ROOT)
)  # the package need not be installed; it is imported while the first process starts

GRACE = 10.0  # seconds that a step may be late before its process is ended
NOTHING = 2  # exit code of a process that could not begin
NEEDED = ("torch", "triton", "transformers", "safetensors", "numpy", "rich", "psutil", "pytest")


def watch(process: subprocess.Popen, events: Path, end: float) -> int | None:
    """Wait for a process of the run; ends it when a step is far beyond its time. None: it had to be ended."""
    from opensala.bench.gpu.steps import read_events

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
    begun = -1
    while time.time() < end:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": _path()} | variables)
        try:
            code = watch(process, events, end)
        except BaseException:
            process.kill()
            raise
        if code == NOTHING:
            raise typer.Exit(NOTHING)
        if code == 0:
            return
        what = "was ended, a step took too long" if code is None else f"ended with exit code {code}"
        print(f"gpu.py: the process {what}", file=sys.stderr, flush=True)
        before, begun = begun, events.read_text().count('"begin"') if events.exists() else 0
        if begun in (0, before):  # another one would end in the same way
            return


def _path() -> str:
    """PYTHONPATH of the run's processes: this checkout before whatever it was."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def report(events: Path, tiny: bool) -> bool:
    """Write the page beside the events and print what matters; whether there were rows and no failures."""
    from opensala.bench.gpu.outcome import page, result_of
    from opensala.bench.gpu.sizes import TINY, Sizes
    from opensala.bench.gpu.steps import read_events

    result = result_of(read_events(events), TINY if tiny else Sizes())
    events.with_suffix(".md").write_text(page(result, f"Kernels on {result['machine'].get('machine', '?')}"))
    fill_ledger(events)
    for step, why in result["skipped"]:
        print(f"left out: {step}: {why}")
    for line in result["tests"]:
        print(f"tests: {line}")
    for target in result["targets"]:
        met = "met" if target["ok"] else "MISSED"
        print(f"{met}: {target['name']}: {target['value']:g} ({target['target']:g})")
    for step, error in result["failed"]:
        print(f"FAILED: {step}: {error}")
    print(f"{len(result['rows'])} rows, {events.with_suffix('.md')}", flush=True)
    return bool(result["rows"]) and not result["failed"]


def fill_ledger(events: Path) -> None:
    """Write the ledger with this run's rows: docs/gpu.md, or beside the page if the rows go elsewhere."""
    from opensala.bench.gpu import ledger

    own = events.parents[1] / "results.csv"
    home = own == ledger.ROWS and "rehearsal" not in events.name
    rows = ledger.read_rows() + (ledger.read_rows(own) if own != ledger.ROWS and own.exists() else [])
    path = ledger.PAGE if home else events.with_suffix(".ledger.md")
    path.write_text(ledger.page(ledger.read_sharing(), rows))
    print(path)


def main(
    output: Annotated[Path, typer.Option(help="Folder of rows and reports.")] = ROOT / "benchmarks",
    seconds: Annotated[float, typer.Option(min=1, help="How long it may take in all.")] = 600,
    only: Annotated[str, typer.Option(help="Groups of steps to run, by commas.")] = "",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same at tiny sizes, on the CPU in Triton's interpreter.")
    ] = False,
) -> None:
    start = time.time()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu.py: not installed: {', '.join(missing)}; what needs them will fail", file=sys.stderr)
    stem = f"gpu_{'rehearsal_' if rehearse else ''}{time.strftime('%Y-%m-%d_%H%M%S')}"
    folder = output.resolve() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "opensala.bench.gpu", "--folder", str(folder), "--stem", stem]
    command += ["--rows", str(output.resolve() / "results.csv"), "--only", only]
    command += ["--start", str(start), "--seconds", str(seconds), *(["--rehearse"] if rehearse else [])]
    events = folder / f"{stem}.jsonl"
    run_processes(command, events, start + seconds, {"TRITON_INTERPRET": "1"} if rehearse else {})
    well = report(events, rehearse)
    print(f"{time.time() - start:.0f} s in all", flush=True)
    raise typer.Exit(0 if well else 1)


if __name__ == "__main__":
    typer.run(main)
