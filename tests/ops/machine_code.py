"""What the machine code of a compiled kernel says: tensor-core instructions, local memory, loops and their
lengths.

Read from the listing of `cuobjdump -sass`, which comes with Triton; no GPU is needed.
"""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton

# `/*0a10*/  @P0 BRA 0x3f0 ;` -- address, instruction, and where it jumps
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)(.*?);")
TENSOR = re.compile(r"^(HGMMA|HMMA|QGMMA|IMMA|UTCHMMA|OMMA)\b")
LOCAL = re.compile(r"^(LDL|STL)\b")


class Instruction(NamedTuple):
    address: int
    name: str  # with its suffixes, without its predicate
    operands: str


def listing(cubin: bytes) -> list[Instruction]:
    """The instructions of the one kernel in a cubin, the padding at its end among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    found = (LINE.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3]) for m in found if m]


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each innermost loop, in order: where a jump goes back."""
    spans = []
    for one in code:
        targets = re.findall(r"0x([0-9a-f]+)", one.operands)
        if one.name.startswith("BRA") and targets and int(targets[-1], 16) < one.address:
            spans.append((int(targets[-1], 16), one.address))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return sorted(inner)


def facts(code: list[Instruction]) -> dict[str, Any]:
    """Instructions in all, tensor-core and local ones, and the instructions of each loop with a product."""
    spans = []
    for lo, hi in loops(code):
        body = [x for x in code if lo <= x.address <= hi]
        if any(TENSOR.match(x.name) for x in body):
            spans.append(len(body))
    return {
        "instructions": len([x for x in code if x.name != "NOP"]),
        "tensor": sorted({m[1] for x in code if (m := TENSOR.match(x.name))}),
        "local": sum(bool(LOCAL.match(x.name)) for x in code),
        "loops": spans,
    }
