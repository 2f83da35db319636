"""Test the GPU kernels, time them, and write the report: what `make gpu` runs, on any machine with torch,
Triton and a CUDA GPU.

    python scripts/gpu.py [--output benchmarks] [--quick]

Rows are added to OUTPUT/results.csv, the report is OUTPUT/reports/kernels_GPU_DATE.md; the tests' log lies
beside it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from opensala.bench.markdown import as_markdown  # noqa: E402

TEST_SECONDS = 200


def run_tests(log: Path) -> str:
    """The tests marked `triton`, several at once where pytest-xdist is there; returns pytest's last line."""
    spread = ["-n", "4", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "triton",
        "tests/ops",
        "-q",
        "-p",
        "no:cacheprovider",
        *spread,
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as stopped:
        output, code = (stopped.stdout or b"").decode() + f"\nstopped after {TEST_SECONDS} s", 1
    log.write_text(output)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(*failed, sep="\n")
    last = (output.strip().splitlines() or ["no output"])[-1].strip("= ")
    return last if code == 0 else f"{last} (FAILED, exit code {code})"


def main(
    output: Annotated[Path, typer.Option(help="Folder of rows and reports.")] = ROOT / "benchmarks",
    quick: Annotated[bool, typer.Option("--quick", help="16K tokens, no whole models.")] = False,
) -> None:
    if not torch.cuda.is_available():
        print(
            "gpu.py: torch sees no CUDA GPU here; the kernels' tests also run without one (make test)",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    start = time.perf_counter()
    reports = output.resolve() / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    name = f"kernels_{gpu}_{time.strftime('%Y-%m-%d')}"
    tests = run_tests(reports / f"{name}.tests.log")
    print(f"tests: {tests} ({time.perf_counter() - start:.0f} s)", flush=True)
    command = [
        sys.executable,
        "-m",
        "opensala",
        "bench",
        "ops",
        "--device",
        "cuda",
        "--rows",
        str(output.resolve() / "results.csv"),
    ]
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise typer.Exit(done.returncode)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    page = as_markdown(result, f"Kernels on {torch.cuda.get_device_name()}", tests)
    (reports / f"{name}.md").write_text(page)
    print(f"{reports / name}.md, {time.perf_counter() - start:.0f} s in all")
    if "FAILED" in tests:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
