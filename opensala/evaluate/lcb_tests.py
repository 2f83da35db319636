"""LiveCodeBench's tests: decoding the published form, running them, and its rules for when an output is
right.

Private tests are published as base64 of zlib of a pickle of a JSON string. A pickle is a program, and is not
run here: its instructions are listed, and unless they are one string and nothing else, it is refused.
"""

import base64
import binascii
import json
import pickletools
import re
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from .sandbox import Limits, call_function, run_program

MOST_BYTES = 1 << 30  # of one problem's tests, unpacked
_STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
_PREAMBLE = "".join(
    f"import {m}\nfrom {m} import *\n"
    for m in (
        "string",
        "re",
        "datetime",
        "collections",
        "heapq",
        "bisect",
        "copy",
        "math",
        "random",
        "statistics",
        "itertools",
        "functools",
        "operator",
        "io",
        "sys",
        "json",
        "typing",
    )
)
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class ProgramTest:
    """`input` and `output` as published: text for programs, for functions a JSON value a line (arguments) and
    one (result)."""

    input: str
    output: str
    functional: bool


def decode_tests(text: str, where: str) -> list[ProgramTest]:
    """Tests of a field: a JSON list, or the packed form.

    Raises:
        ValueError: neither; `where` says which file, line and field.
    """
    try:
        found = json.loads(text if text.lstrip()[:1] == "[" else _unpacked(text))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(
            f"{where}: neither a JSON list of tests nor LiveCodeBench's packed form ({error})"
        ) from error
    if not isinstance(found, list):
        raise ValueError(f"{where}: must be a list of tests, got {str(found)[:60]!r}")
    tests = []
    for n, test in enumerate(found, 1):
        if not isinstance(test, dict) or not all(
            isinstance(test.get(k), str) for k in ("input", "output", "testtype")
        ):
            raise ValueError(
                f"{where}, test {n}: must have the strings input, output and testtype, got {str(test)[:80]!r}"
            )
        if test["testtype"] not in ("stdin", "functional"):
            raise ValueError(
                f"{where}, test {n}: testtype must be stdin or functional, got {test['testtype']!r}"
            )
        tests.append(ProgramTest(test["input"], test["output"], test["testtype"] == "functional"))
    return tests


def _unpacked(text: str) -> str:
    engine = zlib.decompressobj()
    data = engine.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
    if engine.unconsumed_tail or not engine.eof:
        raise ValueError(f"cut short, or more than {MOST_BYTES:,} bytes unpacked")
    strings: list[str] = []
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name in _STRINGS:
            strings.append(str(argument))
        elif instruction.name not in _HARMLESS:
            raise ValueError(f"the pickle is more than one string: it has the instruction {instruction.name}")
    if len(strings) != 1:
        raise ValueError(f"the pickle holds {len(strings)} strings instead of one")
    return strings[0]


def extract_code(answer: str) -> str:
    """The last fenced block of an answer; nothing if there is none."""
    blocks = _FENCE.findall(answer)
    return blocks[-1] if blocks else ""


def passes(code: str, tests: list[ProgramTest], function: str, limits: Limits) -> bool:
    """Whether a program passes all tests; it ends at the first that it does not."""
    return bool(code.strip()) and all(_passes(_PREAMBLE + code, test, function, limits) for test in tests)


def _passes(source: str, test: ProgramTest, function: str, limits: Limits) -> bool:
    if not test.functional:
        outcome = run_program(source, test.input, limits)
        return outcome.ended == "ok" and same_output(outcome.output, test.output)
    try:
        arguments, wanted = [json.loads(line) for line in test.input.split("\n")], json.loads(test.output)
    except json.JSONDecodeError:  # the benchmark's own file is at fault: nobody can pass this test
        return False
    outcome = call_function(source, function, arguments, limits)
    return outcome.ended == "ok" and bool(outcome.value == wanted)


def same_output(printed: str, wanted: str) -> bool:
    """Line by line with white space around dropped; lines that differ are equal if they are the same decimal
    numbers."""
    mine, right = ([line.strip() for line in text.strip().split("\n")] for text in (printed, wanted))
    return len(mine) == len(right) and all(
        a == b or _same_numbers(a, b) for a, b in zip(mine, right, strict=True)
    )


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(x) for x in a.split()] == [Decimal(x) for x in b.split()]
    except InvalidOperation:
        return False
