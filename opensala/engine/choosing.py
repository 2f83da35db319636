"""What each sequence of a step gets: from hidden states to tokens, scores of prompts, and errors."""

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from ..model.batch import on_device
from ..ops import Likeliest, likeliest
from .detokenize import Detokenizer
from .grammar import GrammarTooComplex, Guide
from .request import Completion, Sequence
from .runner import Runner
from .sampler import Choice, choose
from .scheduler import Step, Work
from .speculate import Drafter


@dataclass(eq=False)
class ActiveRequest:
    """What the engine keeps beside a sequence while its request runs."""

    sequence: Sequence
    detokenizer: Detokenizer
    completion: Completion
    generator: torch.Generator | None
    drafter: Drafter | None
    targets: array  # of the prompt's tokens to score: what follows each place
    guide: Guide | None = None  # where the answer stands in the form that it must have
    numbers: list[float] = field(default_factory=list)
    takes_likeliest: bool = field(init=False)  # nothing but the model decides on its tokens

    def __post_init__(self) -> None:
        free = self.generator is None and self.guide is None
        self.takes_likeliest = free and not self.sequence.params.has_penalties

    def number(self, place: int) -> float | None:
        """What the answer's token at `place` is drawn with, the same however often it is asked for; None if
        greedy."""
        if self.generator is None:
            return None
        while len(self.numbers) <= place:
            self.numbers.append(float(torch.rand((), generator=self.generator, dtype=torch.float64)))
        return self.numbers[place]


@dataclass
class Outcome:
    """What a step found for one sequence; `kept` of its work's tokens stay computed."""

    kept: int
    choices: list[Choice] = field(default_factory=list)
    scores: list[tuple[float, bool]] = field(default_factory=list)
    error: str | None = None
    by_request: bool = False  # the error is the request's own doing


class Chooser:
    """Chooses tokens and scores prompts for the works of a step.

    Args:
        runner: makes logits of hidden states.
        requests: the running ones by id; looked into, never changed.
        end_ids: tokens that end an answer.
    """

    def __init__(
        self, runner: Runner, requests: Mapping[str, ActiveRequest], end_ids: frozenset[int]
    ) -> None:
        self.runner, self.end_ids, self._requests = runner, end_ids, requests

    def choose(self, step: Step, hidden: Tensor) -> list[Outcome]:
        """What the sequence of each work gets, of the normalised hidden states `[T, W]` of a step."""
        outcomes = [Outcome(work.count - work.drafted) for work in step.works]
        pairs = list(zip(step.works, outcomes, strict=True))
        wanted = [(w, found) for w, found in pairs if w.completes and w.sequence.params.max_tokens]
        if wanted:
            # In a decoding step these are all rows, and in order.
            every = sum(work.drafted + 1 for work, _ in wanted) == len(hidden)
            rows = hidden if every else hidden[on_device(_rows(step), hidden.device)]
            self._choose_tokens(wanted, self.runner.logits(rows))
        first = 0
        for work, found in pairs:
            if work.sequence.params.score_from is not None:
                self._score(work, hidden[first : first + work.count], found)
            first += work.count
        return outcomes

    def _choose_tokens(self, wanted: list[tuple[Work, Outcome]], logits: Tensor) -> None:
        """Tokens of the works that complete, from logits `[R, V]` of the places behind which one is
        wanted."""
        answers, first = likeliest(logits), 0
        for work, found in wanted:
            sequence = work.sequence
            request = self._requests[sequence.request_id]
            text = list(sequence.tokens) if sequence.params.has_penalties else []
            for i in range(work.drafted + 1):
                row = first + i
                best = answers[row]
                if not _finite(best):
                    place = f"behind token {sequence.num_tokens + i}"
                    found.error = _not_finite(place, "; try dtype float32")
                    break
                token, logit = best.token, best.highest
                if not request.takes_likeliest:
                    try:
                        token = self._choose_token(request, i, logits[row], text)
                    except GrammarTooComplex as error:
                        found.error, found.by_request = str(error), True
                        break
                    if token != best.token:
                        logit = float(logits[row, token])
                top = _most_likely(logits[row], best.lse, n) if (n := sequence.params.logprobs) else ()
                found.choices.append(Choice(token, logit - best.lse, top))
                text.append(token)
                wrong = i == work.drafted or sequence.draft[i] != token  # what is behind it, if anything
                if wrong or self._ends(sequence, token, len(found.choices)):
                    break
            found.kept += max(0, len(found.choices) - 1)
            first += work.drafted + 1

    def _choose_token(self, request: ActiveRequest, ahead: int, logits: Tensor, text: SequenceOf[int]) -> int:
        """The token `ahead` places behind the sequence's last one, from logits `[V]`.

        Raises:
            GrammarTooComplex: see `Guide.allowed`.
        """
        sequence, guide = request.sequence, request.guide
        place = len(sequence.tokens) - sequence.num_prompt + ahead
        number = request.number(place)
        if guide is None:
            return choose(logits, sequence, text, number)
        guide.rewind(place)
        token = choose(logits, sequence, text, number, guide.allowed())
        guide.take(token)
        return token

    def _ends(self, sequence: Sequence, token: int, new: int) -> bool:
        params = sequence.params
        if token in params.stop_token_ids or (token in self.end_ids and not params.ignore_eos):
            return True
        return sequence.num_tokens - sequence.num_prompt + new >= params.max_tokens

    def _score(self, work: Work, hidden: Tensor, found: Outcome) -> None:
        """Log-probabilities of prompt tokens that follow the places of this work; a few hundred rows at a
        time."""
        sequence = work.sequence
        known = self._requests[sequence.request_id].targets
        assert sequence.params.score_from is not None, "only such requests have targets"
        begin = max(0, sequence.params.score_from - 1 - sequence.num_cached)
        for start in range(begin, work.count, self.runner.rows_at_a_time):
            end = min(work.count, start + self.runner.rows_at_a_time)
            logits = self.runner.logits(hidden[start:end])
            rows = likeliest(logits)
            if not all(map(_finite, rows)):
                place = f"between tokens {sequence.num_cached + start} and {sequence.num_cached + end}"
                found.error = _not_finite(place)
                return
            targets = known[sequence.num_cached + start : sequence.num_cached + end]
            places = torch.tensor(targets, dtype=torch.long, device=logits.device)[:, None]
            of_targets = logits.gather(1, places)[:, 0].tolist()
            for row, target, logit in zip(rows, targets, of_targets, strict=True):
                found.scores.append((logit - row.lse, row.token == target))


def _rows(step: Step) -> np.ndarray:
    """Rows of the step behind which a token is wanted, of all its works in order."""
    first, rows = 0, []
    for work in step.works:
        first += work.count
        if work.completes and work.sequence.params.max_tokens:
            rows.append(np.arange(first - work.drafted - 1, first))
    return np.concatenate(rows)


def _finite(row: Likeliest) -> bool:
    """Whether all logits of a row are."""
    return isfinite(row.lse) and isfinite(row.lowest) and isfinite(row.highest)


def _not_finite(place: str, advice: str = "") -> str:
    return (
        f"the model's output {place} is not finite (NaN or infinity): its weights are damaged, or its dtype "
        f"overflows{advice}"
    )


def _most_likely(logits: Tensor, lse: float, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of all `[V]` and their log-probabilities."""
    best = logits.topk(count)
    return tuple(
        (i, logit - lse) for i, logit in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
