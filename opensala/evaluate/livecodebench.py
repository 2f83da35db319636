"""LiveCodeBench's code generation from its published files (not part of this package): write a program, pass
every test.

Version 5 is the problems that were new in release 5 (the file `test5.jsonl`, 167 of them), version 6 those
new in
release 6 (`test6.jsonl`, 175): published scores are multiples of 1/167 and 1/175. In files of other names the
problems are told apart by their contest's date, by the months that the releases name; the borders to the day
were not published.
pass@1 with one greedy answer. The prompt is in our own words. The programs run in `sandbox.py`.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from ..data.prompts import PromptFormat
from .jsonl import read_jsonl
from .lcb_tests import decode_tests, extract_code, passes
from .samples import Group, Sample
from .sandbox import Limits

FIELDS = {
    "question_title": str,
    "question_content": str,
    "question_id": str,
    "contest_date": str,
    "starter_code": str,
    "difficulty": str,
    "platform": str,
    "public_test_cases": str,
    "private_test_cases": str,
    "metadata": str,
}
WINDOWS = {"v5": (date(2024, 10, 1), date(2025, 1, 31)), "v6": (date(2025, 2, 1), date(2025, 4, 30))}
_VERSION_OF = {"test5.jsonl": "v5", "test6.jsonl": "v6"}
_LAST_OLD = ("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl")
BUDGET = 4096  # tokens; what a thinking model needs is many times that


class LiveCodeBenchSuite:
    """Problems of the given versions.

    Args:
        path: a file of the published JSON lines, or a folder of them.
        versions: of `v5` and `v6`.
        samples: problems of each version; 0 for all.
        budget: tokens of an answer.
        limits: of each run of a program.

    Raises:
        ValueError: no such file, a line without the fields, no problem of these versions.
    """

    name = "livecodebench"

    def __init__(
        self,
        path: Path,
        versions: tuple[str, ...] = ("v5", "v6"),
        samples: int = 0,
        budget: int = BUDGET,
        limits: Limits | None = None,
    ) -> None:
        self._files = (
            [f for f in sorted(path.glob("*.jsonl")) if f.name not in _LAST_OLD] if path.is_dir() else [path]
        )
        if not self._files:
            raise ValueError(
                f"{path}: holds no test5.jsonl, test6.jsonl or other .jsonl file of LiveCodeBench's problems"
            )
        self._versions, self._samples, self._budget, self._limits = (
            versions,
            samples,
            budget,
            limits or Limits(),
        )
        self._where = {version: self._places(version) for version in versions}
        for version, places in self._where.items():
            if not places:
                raise ValueError(
                    f"{path}: no problem of LiveCodeBench {version} in it: it needs "
                    f"{'/'.join(k for k, v in _VERSION_OF.items() if v == version)}, "
                    f"or contest dates from {WINDOWS[version][0]} to {WINDOWS[version][1]}"
                )

    def _places(self, version: str) -> list[tuple[Path, int]]:
        """File and line of each problem of a version. Problems are read again when their turn comes: all
        tests together are gigabytes."""
        found, seen = [], set[str]()
        for file in self._files:
            for number, row in read_jsonl(file, FIELDS):
                if _version(file, number, row, version) and row["question_id"] not in seen:
                    seen.add(row["question_id"])
                    found.append((file, number))
        return found[: self._samples or None]

    def settings(self) -> dict[str, Any]:
        digests = {f.name: _digest(f) for f in self._files}
        return {
            "prompt": "own wording",
            "budget": self._budget,
            "seconds a test": self._limits.seconds,
            "memory": self._limits.memory,
            **digests,
        }

    def longest(self) -> int:
        return 0

    def groups(self, form: PromptFormat) -> Iterator[Group]:
        for version, places in self._where.items():
            wanted = {(file, number) for file, number in places}
            for file in self._files:
                for number, row in read_jsonl(file, FIELDS):
                    if (file, number) in wanted:
                        id = f"livecodebench/{version}/{row['question_id']}"
                        yield Group(
                            (id,), partial(self._load, id, version, row, f"{file}, line {number}", form)
                        )

    def _load(
        self, id: str, version: str, row: dict[str, Any], where: str, form: PromptFormat
    ) -> list[Sample]:
        tests = [
            test
            for field in ("public_test_cases", "private_test_cases")
            for test in decode_tests(row[field], f"{where}, field {field!r}")
        ]
        function = _function(row, where) if any(t.functional for t in tests) else ""
        limits = self._limits
        prompt = tuple(form.encode(form.messages([{"role": "user", "content": prompt_of(row)}])))
        return [
            Sample(
                id,
                f"livecodebench_{version}",
                0,
                prompt,
                (f"{len(tests)} tests",),
                self._budget,
                "pass@1",
                lambda answer: float(passes(extract_code(answer), tests, function, limits)),
            )
        ]


def prompt_of(row: dict[str, Any]) -> str:
    """The problem, and how the program is to be handed in."""
    if row["starter_code"].strip():
        form = (
            "Complete this code; it is called with the inputs of the tests, and what it returns is "
            f"checked.\n\n```python\n{row['starter_code'].rstrip()}\n```"
        )
    else:
        form = (
            "The program reads standard input and prints its result to standard output, and nothing besides."
        )
    return (
        "Solve this programming problem in Python. Put the whole program into one code block at the end "
        "of your answer.\n\n"
        f"# {row['question_title']}\n\n{row['question_content']}\n\n{form}"
    )


def _version(file: Path, number: int, row: dict[str, Any], version: str) -> bool:
    if file.name in _VERSION_OF:
        return _VERSION_OF[file.name] == version
    try:
        day = date.fromisoformat(row["contest_date"][:10])
    except ValueError as error:
        raise ValueError(
            f"{file}, line {number}: field 'contest_date' must begin with a date like 2025-01-31, got "
            f"{row['contest_date']!r}"
        ) from error
    first, last = WINDOWS[version]
    return first <= day <= last


def _function(row: dict[str, Any], where: str) -> str:
    try:
        name = json.loads(row["metadata"]).get("func_name")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{where}: field 'metadata' must be a JSON object") from error
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"{where}: field 'metadata' must name the function to call as func_name, got {name!r}"
        )
    return name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
