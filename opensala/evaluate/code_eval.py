"""lm-eval's HumanEval and MBPP take their scorer, `code_eval`, from the hub, which runs programs with the
rights of whoever runs lm-eval.
While `sandboxed_code_eval` is open they get this one instead: the same figures, from programs run in
    `sandbox.py`.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .sandbox import Limits, run_program

SECONDS = 3.0  # for a program and its tests: what the hub's scorer allows


class CodeEval:
    """Stands where `evaluate.load("code_eval")` would."""

    def compute(
        self,
        *,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        k: Sequence[int] = (1,),
        **options: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k of candidate programs `predictions[task][candidate]` against the tests `references[task]`,
        and every result."""
        limits = Limits(float(options.get("timeout", SECONDS)))
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, (candidates, tests) in enumerate(zip(predictions, references, strict=True)):
            results[task] = [
                (n, {"task_id": task, "completion_id": n, "passed": passes_tests(code, tests, limits)})
                for n, code in enumerate(candidates)
            ]
        right = [(len(rows), sum(row["passed"] for _, row in rows)) for rows in results.values()]
        return {
            f"pass@{n}": sum(pass_at(total, good, n) for total, good in right) / len(right)
            for n in k
            if all(total >= n for total, _ in right)
        }, results


def passes_tests(code: str, tests: str, limits: Limits) -> bool:
    """Whether a program runs through its tests to their end: one that leaves early has not passed."""
    end = secrets.token_hex(16)
    outcome = run_program(f"{code}\n{tests}\nprint()\nprint({end!r})\n", limits=limits)
    return outcome.ended == "ok" and outcome.output.rstrip("\n").endswith(end)


def pass_at(total: int, right: int, k: int) -> float:
    """Chance that one of `k` candidates drawn from `total`, of which `right` pass, passes (Chen et al. 2021,
    section 2.1)."""
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)


@contextmanager
def sandboxed_code_eval() -> Iterator[None]:
    """Let `evaluate.load("code_eval")` give the sandboxed scorer; other names are loaded as ever."""
    import evaluate

    load = evaluate.load
    evaluate.load = lambda path, *a, **k: CodeEval() if path == "code_eval" else load(path, *a, **k)
    try:
        yield
    finally:
        evaluate.load = load
