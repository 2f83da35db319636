"""RULER as a suite: generated here at any length, or read from files that RULER's own scripts prepared."""

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data.prompts import PromptFormat
from ..data.ruler import TASKS, RulerTask, ruler_task
from .document_cache import DocumentCache
from .jsonl import read_jsonl
from .ruler_files import task_of
from .samples import Group, Sample, scorer
from .scoring import string_match_all, string_match_part

MIN_LENGTH, MAX_LENGTH = 1024, 4 * 2**20


def rule_of(task: RulerTask) -> Callable[[str, Any], float]:
    return string_match_part if task.any_reference else string_match_all


@dataclass(frozen=True)
class RulerSuite:
    """Generated RULER.

    Args:
        tasks: names of task types; empty for all thirteen.
        lengths: tokens of prompt and answer together.
        samples: questions of each task and length.
        questions: questions asked about each document, where the task allows several.
        seed: of the documents.
        cache: folder in which made documents are kept; None keeps none.

    Raises:
        ValueError: an unknown task, a length outside 1K to 4M, no samples.
    """

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (4096,)
    samples: int = 10
    questions: int = 1
    seed: int = 0
    cache: Path | None = None
    name: str = "ruler"

    def __post_init__(self) -> None:
        for task in self.tasks:
            ruler_task(task)
        for length in self.lengths:
            if not MIN_LENGTH <= length <= MAX_LENGTH:
                raise ValueError(f"length must be {MIN_LENGTH:,} to {MAX_LENGTH:,} tokens, got {length:,}")
        for field in ("samples", "questions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    def settings(self) -> dict[str, Any]:
        """The essay is the prose of the standard library, hence the version."""
        python = ".".join(platform.python_version_tuple()[:2])
        return {
            "source": "generated",
            "seed": self.seed,
            "questions per document": self.questions,
            "essay": f"Python {python}",
        }

    def longest(self) -> int:
        return max(self.lengths)

    def groups(self, form: PromptFormat) -> Iterator[Group]:
        documents = DocumentCache(self.cache, form)
        for length in self.lengths:
            for name in self.tasks or TASKS:
                task = TASKS[name]
                each = self.questions if task.shareable else 1
                for index in range(-(-self.samples // each)):
                    count = min(each, self.samples - index * each)
                    ids = tuple(f"{name}/{length}/{index}/{n}" for n in range(count))
                    yield Group(ids, partial(self._load, task, length, index, ids, documents))

    def _load(
        self, task: RulerTask, length: int, index: int, ids: tuple[str, ...], documents: DocumentCache
    ) -> list[Sample]:
        prompts, questions = documents.document(task, length, index, self.seed, self.questions)
        rule = rule_of(task)
        return [
            Sample(
                id,
                task.name,
                length,
                prompt,
                question.references,
                task.budget,
                rule.__name__,
                scorer(rule, question.references),
                question.depth,
            )
            for id, prompt, question in zip(ids, prompts, questions, strict=False)
        ]


class RulerFiles:
    """RULER from files: `FOLDER/TASK/validation.jsonl` with input, outputs and answer_prefix.

    The length class of a file is the longest `length` in it; samples keep the order of the lines.

    Raises:
        ValueError: no such files; a line without the fields.
    """

    def __init__(self, folder: Path, tasks: tuple[str, ...] = (), samples: int = 0) -> None:
        self.name, self._samples = "ruler", samples
        self._files = [
            f for f in sorted(folder.glob("*/validation.jsonl")) if not tasks or task_of(f) in tasks
        ]
        if not self._files:
            raise ValueError(
                f"{folder}: holds no TASK/validation.jsonl, the files that RULER's scripts write"
                f"{' for ' + ', '.join(tasks) if tasks else ''}"
            )
        fields = {"input": str, "outputs": list, "answer_prefix": str, "length": int}
        self._rows = {task_of(f): [row for _, row in read_jsonl(f, fields)] for f in self._files}

    def settings(self) -> dict[str, Any]:
        return {
            "source": "files",
            **{task_of(f): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in self._files},
        }

    def longest(self) -> int:
        return max(row["length"] for rows in self._rows.values() for row in rows)

    def groups(self, form: PromptFormat) -> Iterator[Group]:
        for task, rows in self._rows.items():
            length = max(row["length"] for row in rows)
            for n, row in enumerate(rows[: self._samples or None]):
                id = f"{task}/{length}/{n}"
                yield Group((id,), partial(self._load, id, TASKS[task], length, row, form))

    def _load(
        self, id: str, task: RulerTask, length: int, row: dict[str, Any], form: PromptFormat
    ) -> list[Sample]:
        text = form.messages([{"role": "user", "content": row["input"]}]) if form.uses_chat else row["input"]
        rule, references = rule_of(task), tuple(row["outputs"])
        return [
            Sample(
                id,
                task.name,
                length,
                tuple(form.encode(text + row["answer_prefix"])),
                references,
                task.budget,
                rule.__name__,
                scorer(rule, references),
            )
        ]
