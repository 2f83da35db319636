"""The search for launch configurations, rehearsed: everything but the GPU and its compiler."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.grid import HAS_TRITON

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def rehearse(folder, *options):
    return subprocess.run(
        [sys.executable, "scripts/tune_kernels.py", "--rehearse", "--output", str(folder), *options],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_variants_are_timed_and_right(tmp_path):
    done = rehearse(tmp_path, "--each", "3", "--seconds", "240")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "tune_kernels.csv").open()))
    assert {r["kernel"] for r in rows} == {"merge", "pair", "band", "op"}
    assert [r["variant"] for r in rows[:4]] == ["in use"] * 4
    assert len(rows) >= 4 + 4 * 3 + 1  # the last: the best of each together
    for r in rows:
        assert not r["note"] and float(r["ms"]) > 0 and float(r["error"]) < 1e-5, r
    parts = int(done.stdout.split("merge: ")[1].split()[0])
    assert parts > 0  # otherwise nothing would be compared
