"""What importing the package sets up before torch takes memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import opensala, torch
x = torch.empty(8 << 20, dtype=torch.uint8)
place, inside = x.data_ptr() + (4 << 20), False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        begin, end = (int(part, 16) for part in first.split("-"))
        inside = begin <= place < end
    elif inside and first == "VmFlags:":
        print("hg" in line.split())
"""


@pytest.mark.skipif(not HUGE.exists(), reason="huge pages are asked for on Linux only")
@pytest.mark.parametrize(("asked", "huge"), [(None, True), ("0", False)])
def test_large_tensors_are_in_huge_pages_unless_told_otherwise(asked, huge):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if asked is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = asked
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(huge)
