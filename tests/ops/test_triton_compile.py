"""Every Triton kernel compiles for GPUs this machine need not have, keeps its values in registers and fits
shared memory."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.ops.grid import HAS_TRITON

ARCHS = (80, 90, 120)
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")]


@pytest.fixture(scope="module")
def compiled():
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", *map(str, ARCHS)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


# Bytes a thread that Triton 3.7, the one that torch 2.13 brings for CUDA, spills where 3.9 spills none:
# (case, arch).
KNOWN_SPILLS = {
    ("tile", 80): 48,
    ("pair_kernel large blocks", 90): 120,
    ("lse_kernel pages float wide", 90): 40,
}


# In every version: rows of scores held by 32 warps, whose threads have 64 registers. Reading such rows from
# memory in each of some 23 steps would cost far more than these bytes.
LONG_ROWS = {
    ("top_kernel 16384", 90): 32,
    ("top_kernel 16384 pages", 90): 32,
    ("top_kernel 32768", 90): 80,
}


def allowed_spill(case):
    known = {**LONG_ROWS, **(KNOWN_SPILLS if version("triton").split(".")[:2] == ["3", "7"] else {})}
    return known.get((case["name"], case["arch"]), 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spilling(compiled, arch):
    cases = [case for case in compiled["cases"] if case["arch"] == arch]
    assert cases
    problems = []
    for case in cases:
        name = f"{case['kernel']} ({case['name']})"
        if case["error"]:
            problems.append(f"{name}: {case['error']}")
        elif case["spilled"] > allowed_spill(case):
            problems.append(
                f"{name} spills {case['spilled']} bytes a thread with {case['registers']} registers"
            )
        elif case["shared"] > case["limit"]:
            problems.append(
                f"{name} wants {case['shared']} bytes of shared memory, there are {case['limit']}"
            )
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_launched_kernel_has_a_case(compiled, arch):
    covered = {case["kernel"] for case in compiled["cases"] if case["arch"] == arch}
    assert set(compiled["kernels"]) == covered
