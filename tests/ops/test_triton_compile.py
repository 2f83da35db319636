"""Every Triton kernel compiles for GPUs this machine need not have, keeps its values in registers and fits
shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.ops.grid import HAS_TRITON

if HAS_TRITON:
    from tests.ops import machine_code

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


# Bytes a thread: rows of scores held by 32 warps, whose threads have 64 registers. Reading such rows from
# memory in each of some 23 steps would cost far more.
KNOWN_SPILLS = {
    ("top_kernel 16384", 90): 32,
    ("top_kernel 16384 pages", 90): 32,
    ("top_kernel 32768", 90): 80,
}


def allowed_spill(case):
    return KNOWN_SPILLS.get((case["name"], case["arch"]), 0)


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


class Budget(NamedTuple):
    """What the machine code of a kernel at the released sizes, in bfloat16, may take."""

    unit: str  # the tensor-core instruction it must have, and no other
    registers: int  # a thread
    programs: int  # that must fit a multiprocessor at once
    loops: tuple[int, ...]  # instructions of each loop with a product, ascending


# The larger number of Triton 3.6.0 and 3.7.1, and a twentieth on top for loops. Whoever makes a kernel
# better may lower its numbers; a number that must rise is a finding.
BUDGETS = {
    ("output 128 bf16", 90): Budget("HGMMA", 246, 2, (687,)),
    ("segment 128 bf16", 90): Budget("HGMMA", 125, 2, (279,)),
    ("output 128 bf16 packed", 90): Budget("HGMMA", 252, 2, (687,)),
    ("segment 128 bf16 packed", 90): Budget("HGMMA", 121, 2, (274,)),
    ("attend_kernel 1", 90): Budget("HMMA", 96, 3, (482,)),
    ("band_kernel", 90): Budget("HGMMA", 224, 1, (395, 497)),
    ("band_kernel pages", 90): Budget("HGMMA", 238, 1, (401, 499)),
    ("query 0", 90): Budget("HMMA", 148, 3, (378,)),
    ("query 0 dense", 90): Budget("HMMA", 146, 3, (370,)),
    ("tile", 90): Budget("HGMMA", 218, 1, (422, 516)),
    ("tile dense", 90): Budget("HGMMA", 218, 1, (422, 516)),
    ("pair_kernel", 90): Budget("HGMMA", 156, 3, (588,)),
    ("pair_kernel pages", 90): Budget("HGMMA", 156, 3, (588,)),
    ("lse_kernel prefill", 90): Budget("HGMMA", 178, 2, (537, 542, 662, 666)),
    ("score_kernel prefill", 90): Budget("HGMMA", 151, 3, (458,)),
    ("lse_kernel pages prefill", 90): Budget("HGMMA", 184, 2, (572, 668, 707, 802)),
    ("score_kernel pages prefill", 90): Budget("HGMMA", 143, 3, (479,)),
    ("score_kernel pages decode", 90): Budget("HGMMA", 72, 6, (294,)),
    ("8 bits, groups of 128, *bf16", 90): Budget("HMMA", 96, 2, (835,)),
    ("output 128 bf16", 80): Budget("HMMA", 224, 2, (546,)),
    ("segment 128 bf16", 80): Budget("HMMA", 128, 4, (348,)),
    ("attend_kernel 1", 80): Budget("HMMA", 110, 2, (495,)),
    ("band_kernel", 80): Budget("HMMA", 185, 1, (395, 439)),
    ("query 0", 80): Budget("HMMA", 128, 4, (381,)),
    ("tile", 80): Budget("HMMA", 255, 1, (375, 486)),
    ("pair_kernel", 80): Budget("HMMA", 183, 2, (1157,)),
    ("lse_kernel prefill", 80): Budget("HMMA", 230, 2, (760, 760, 874, 875)),
    ("score_kernel prefill", 80): Budget("HMMA", 228, 2, (794,)),
    ("output 128 bf16", 120): Budget("HMMA", 216, 2, (569,)),
    ("segment 128 bf16", 120): Budget("HMMA", 128, 3, (345,)),
    ("attend_kernel 1", 120): Budget("HMMA", 88, 1, (475,)),
    ("band_kernel", 120): Budget("HMMA", 194, 1, (404, 451)),
    ("query 0", 120): Budget("HMMA", 144, 2, (414,)),
    ("tile", 120): Budget("HMMA", 255, 1, (393, 494)),
    ("pair_kernel", 120): Budget("HMMA", 178, 1, (1060,)),
    ("lse_kernel prefill", 120): Budget("HMMA", 218, 2, (823, 830, 913, 919)),
    ("score_kernel prefill", 120): Budget("HMMA", 210, 1, (875,)),
}


@pytest.mark.parametrize(("name", "arch"), BUDGETS, ids=str)
def test_half_precision_kernels_keep_to_their_budget(compiled, name, arch):
    budget = BUDGETS[name, arch]
    [case] = [case for case in compiled["cases"] if (case["name"], case["arch"]) == (name, arch)]
    assert case["tensor"] == [budget.unit]
    assert case["local"] == 0 or allowed_spill(case), "reads or writes local memory"
    assert case["registers"] <= budget.registers and case["together"] >= budget.programs
    assert len(case["loops"]) == len(budget.loops)
    assert all(a <= b for a, b in zip(sorted(case["loops"]), budget.loops, strict=True)), case["loops"]


def test_loops_are_found_in_a_listing():
    """An outer loop around two: one with a product, the other without; jumps forward are none."""
    lines = [
        "MOV R1, c[0x0][0x28]",
        "@P0 BRA 0x60",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",
        "STL.64 [R1], R2",
        "@!P1 BRA 0x20",
        "FADD R0, R0, R1",
        "BRA.U UP0, 0x50 &req={1} ?trans6",
        "@P2 BRA 0x10",
        "EXIT",
    ]
    text = "\n".join(f"        /*{16 * i:04x}*/     {line} ;  /* 0x1f */" for i, line in enumerate(lines))
    facts = machine_code.facts(machine_code.parse(text))
    assert facts == {"instructions": 9, "tensor": ["HGMMA"], "local": 1, "loops": [3]}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_launched_kernel_has_a_case(compiled, arch):
    covered = {case["kernel"] for case in compiled["cases"] if case["arch"] == arch}
    assert set(compiled["kernels"]) == covered
