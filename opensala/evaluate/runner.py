"""Running suites: every sample not yet in the results is asked, scored and written down at once."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..data.prompts import PromptFormat
from ..engine import Engine, SamplingParams, TokenEvent
from ..engine.progress import token_progress
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
                params = SamplingParams(max_tokens=samples[0].budget)
                clock = _Clock()
                answers = engine.generate(
                    [s.prompt for s in samples], params, on_event=clock, on_read=advance
                )
                for sample, answer in zip(samples, answers, strict=True):
                    text = without_thoughts(answer.text) if strip_thoughts else answer.text
                    assert answer.reuse is not None, "it ran"
                    row = sample_row(suite.name, sample, text) | {
                        "new_tokens": len(answer.tokens),
                        "read_tokens": answer.reuse.computed,
                        "seconds": round(clock.seconds[answer.request_id], 3),
                    }
                    results.add(row)
                    if done is not None:
                        done(row)
            engine.forget_prefixes()  # no other group begins alike: memory stays what the longest one takes


class _Clock:
    """Seconds between the end of one request of a group and the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, event: TokenEvent) -> None:
        if event.completion is not None:
            now = time.perf_counter()
            self.seconds[event.request_id], self._last = now - self._last, now


def sample_row(suite: str, sample: Sample, prediction: str) -> dict[str, Any]:
    """What is written down of a sample and its answer, beside what that cost."""
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
