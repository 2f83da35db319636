"""NVIDIA's own tools on a small run: the memory checker, and hardware counters of our kernels' launches."""

import os
import shutil
import subprocess
import sys

from .steps import Context, Step
from .tests import ROOT


def steps() -> list[Step]:
    return [
        Step("memory checker", "sanitizer", 15, sanitize),
        Step("hardware counters", "counters", 15, count),
    ]


def _small_run(context: Context, stem: str, groups: str) -> list[str]:
    """This program at tiny sizes, on the device."""
    command = [sys.executable, "-m", "opensala.bench.gpu", "--folder", str(context.folder), "--stem", stem]
    command += ["--rows", str(context.folder / f"{stem}.csv"), "--only", groups]
    command += ["--sizes", "tiny"]
    return [*command, "--start", "0", "--seconds", "1e11"]


def _run_tool(context: Context, tool: str, arguments: list[str], groups: str) -> None:
    """Run a small run under a tool.

    Raises:
        RuntimeError: the tool found something, or did not end in time.
    """
    if shutil.which(tool) is None:
        context.report.note(f"{tool} is not on PATH: left out")
        return
    stem = f"{context.stem}.{tool}"
    command = [tool, *arguments, *_small_run(context, stem, groups)]
    with context.file(f"{tool}.log").open("w") as log:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                timeout=min(context.seconds_left, 1e6),
            ).returncode
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{tool} was stopped after its time; see {log.name}") from None
    if code:
        raise RuntimeError(f"{tool} ended with exit code {code}; see {log.name}")
    context.report.note(f"{tool}: nothing found")


def sanitize(context: Context) -> None:
    """Every access of a tiny prefill and decode."""
    _run_tool(context, "compute-sanitizer", ["--tool", "memcheck", "--error-exitcode", "9"], "model")


def count(context: Context) -> None:
    """Counters of the first launches of our kernels (the clock is left alone)."""
    arguments = ["--clock-control", "none", "-k", "regex:_kernel$", "--launch-count", "30", "--csv"]
    _run_tool(context, "ncu", [*arguments, "--set", "basic"], "kernels")
