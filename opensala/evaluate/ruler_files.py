"""Files in RULER's own layout: data that its scripts prepared, and predictions to score.

Data lie in `TASK/validation.jsonl` (input, outputs, answer_prefix, length), predictions in `TASK.jsonl`
(pred, outputs): the file's name says which task it is, and so which rule applies.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.ruler import TASKS
from .jsonl import read_jsonl
from .scoring import clean, string_match_all, string_match_part


@dataclass(frozen=True)
class FileScore:
    """The score of one file of predictions, 0 to 100 with two decimals as RULER prints it."""

    task: str
    rule: str
    score: float
    samples: int
    empty: int

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def task_of(path: Path) -> str:
    """The task a file belongs to: its name, or its folder's for `validation.jsonl`; ValueError if neither is
    a task."""
    name = path.parent.name if path.stem == "validation" else path.stem
    task = name.split("-")[0]
    if task not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        raise ValueError(
            f"{path}: the file's name must be a RULER task, as in RULER's own folders, got {name!r}"
            f"{f': did you mean {near[0]}.jsonl?' if near else ''} Tasks: {', '.join(TASKS)}"
        )
    return task


def score_file(path: Path) -> FileScore:
    """Score a file of predictions by RULER's rules.

    Raises:
        ValueError: a name that is not a task; see `read_jsonl` for what is wrong inside.
    """
    task = task_of(path)
    rule = string_match_part if TASKS[task].any_reference else string_match_all
    records = [record for _, record in read_jsonl(path, {"pred": str, "outputs": list})]
    scores = [rule(r["pred"], r["outputs"]) for r in records]
    return FileScore(
        task,
        rule.__name__,
        round(100 * sum(scores) / len(scores), 2),
        len(scores),
        sum(not clean(r["pred"]) for r in records),
    )
