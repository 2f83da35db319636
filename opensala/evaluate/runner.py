"""Running suites: every sample not yet in the results is asked, scored and written down at once."""

from collections.abc import Callable, Sequence
from typing import Any

from ..data.prompts import PromptFormat
from ..engine import Engine
from ..engine.progress import token_progress
from ..engine.shared import answer_shared
from .results import Results
from .samples import Sample, Suite
from .scoring import without_thoughts


def check_reach(engine: Engine, suites: Sequence[Suite]) -> list[str]:
    """Refuse lengths that this machine cannot hold, before any work; return remarks the user should see."""
    return [note for suite in suites if suite.longest() for note in engine.check_prompt(suite.longest(), 0)]


def run(
    engine: Engine,
    suites: Sequence[Suite],
    results: Results,
    form: PromptFormat,
    *,
    strip_thoughts: bool = False,
    quiet: bool = False,
    done: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Answer and score what `results` lacks, group by group; samples of a group share the reading of their
    document.

    Args:
        strip_thoughts: score what comes after `</think>`.
        done: called with each new row.
    """
    for suite in suites:
        for group in suite.groups(form):
            missing = [id for id in group.ids if id not in results]
            if not missing:
                continue
            samples = [s for s in group.load() if s.id in missing]
            total = sum(len(s.prompt) for s in samples)
            with token_progress(samples[0].id, total, quiet) as advance:
                answers = answer_shared(
                    engine, [s.prompt for s in samples], max_new_tokens=samples[0].budget, progress=advance
                )
                for sample, answer in zip(samples, answers, strict=True):
                    text = without_thoughts(answer.text) if strip_thoughts else answer.text
                    row = _row(suite.name, sample, text) | {
                        "new_tokens": answer.new_tokens,
                        "read_tokens": answer.read_tokens,
                        "seconds": round(answer.seconds, 3),
                    }
                    results.add(row)
                    if done is not None:
                        done(row)


def _row(suite: str, sample: Sample, prediction: str) -> dict[str, Any]:
    return {
        "id": sample.id,
        "suite": suite,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "prompt_tokens": len(sample.prompt),
        "prediction": prediction,
        "references": list(sample.references),
        "rule": sample.rule,
        "score": round(sample.score(prediction), 6),
    }
