"""What is asked of the engine, and what one request is while it runs: a sequence.

A sequence owns its token ids, its pages and its state slot, knows in which mode each of its tokens is
computed, and how it ended. It holds integers and text only; the tensors lie in the storage.
"""

import math
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from ..model.config import AttentionRule
from .grammar import Grammar


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        max_tokens: tokens to generate at most; 0 only reads the prompt (with `score_from`).
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: sample from so many most likely tokens; 0 for all of them.
        top_p: sample from the most likely tokens that together have this probability.
        min_p: leave out tokens less likely than this share of the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and answer; 1
            for none.
        presence_penalty: subtracted from the logits of tokens that the answer holds.
        frequency_penalty: subtracted once for each time the answer holds a token.
        seed: of this request's own generator; None draws one.
        logprobs: how many most likely tokens to report at each place, beside the chosen one.
        stop: the answer ends before the first of these texts.
        stop_token_ids: it ends before one of these tokens, beside the model's own ends of text.
        ignore_eos: go on behind the model's ends of text.
        score_from: report log-probabilities of the prompt's tokens from this place on (1 or later).
        speculate: tokens to draft at most by looking up what followed the last words before; 0 for none, None
            for the engine's setting.
        selection: report for so many of the answer's first tokens which blocks the sparse layers selected.
        grammar: the form that the answer must have; None for any.
        keep_special: special tokens are part of the text too, as the tokenizer writes them.

    Raises:
        ValueError: a field out of its range, naming it and what is allowed.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    score_from: int | None = None
    speculate: int | None = None
    selection: int = 0
    grammar: Grammar | None = None
    keep_special: bool = False

    def __post_init__(self) -> None:
        least = 0 if self.score_from is not None else 1
        whole = {"max_tokens": least, "top_k": 0, "logprobs": 0, "selection": 0}
        whole |= {} if self.score_from is None else {"score_from": 1}
        whole |= {} if self.speculate is None else {"speculate": 0}
        whole |= {} if self.seed is None else {"seed": 0}
        for name, low in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if self.seed is not None and self.seed >= 1 << 63:
            raise ValueError(f"seed must be below 2^63, got {self.seed}")
        for name, low, high, text in _RANGES:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high:
                raise ValueError(f"{name} must be {text}, got {value!r}")
        if 0 < self.temperature < 1e-3:  # quotients of logits would be no numbers any more
            raise ValueError(f"temperature must be {_RANGES[0][3]}, got {self.temperature!r}")
        if self.top_p == 0 or self.repetition_penalty == 0:
            name = "top_p" if self.top_p == 0 else "repetition_penalty"
            raise ValueError(f"{name} must be above 0, got 0")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar must be a Grammar (see Grammar.json_schema), got {self.grammar!r}")
        if self.grammar is not None and self.ignore_eos:
            raise ValueError(
                "ignore_eos cannot be had with a grammar: an answer of its form ends where it ends"
            )
        object.__setattr__(self, "stop", _texts("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


_RANGES = (
    ("temperature", 0, 1e3, "0 (the most likely token), or a number from 0.001 to 1000"),
    ("top_p", 0, 1, "a number above 0 and at most 1"),
    ("min_p", 0, 1, "a number from 0 to 1"),
    ("repetition_penalty", 0, 100, "a number above 0 and at most 100 (1 for none)"),
    ("presence_penalty", -100, 100, "a number from -100 to 100"),
    ("frequency_penalty", -100, 100, "a number from -100 to 100"),
)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} takes texts of at least one character, got {text!r}")
    return texts


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(value)
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"{name} takes token ids (whole numbers of at least 0), got {token!r}")
    return ids


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended: an end of text or stop, its length, the caller, or something that went wrong."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass
class Reuse:
    """An account of a prompt: tokens that were at hand, tokens that were read, and why those had to be;
    `restored` of those at hand were computed before a restart, and read from disk since."""

    reused: int = 0
    computed: int = 0
    why: str = ""
    restored: int = 0


@dataclass(frozen=True)
class Selection:
    """What the sparse layers selected for the query that one token of an answer was chosen by.

    Attributes:
        position: of the query: the place before the token.
        blocks: by layer the block numbers `[Hkv, K]`, ascending, padded with -1; None if the query attended
            to everything before it (dense mode).
    """

    position: int
    blocks: dict[int, np.ndarray] | None


@dataclass
class Completion:
    """A finished request.

    Attributes:
        text: the answer, without ends of text and stop texts.
        tokens: what was generated, an end of text included.
        logprobs: natural logarithm of each token's probability under the model's own distribution.
        top: for each token the most likely ones and their log-probabilities, if asked for.
        scores: log-probability of each prompt token asked for, and whether it was the most likely one.
        finish_reason: why it ended.
        stop: the stop text that ended it; None if something else did.
        error: what went wrong, if that is why.
        by_request: whether what went wrong lies in what was asked for, not in the engine.
        reuse: what of the prompt was at hand; None if it never ran.
        selection: for each of the first tokens what the sparse layers selected, if asked for.
        drafted, accepted: tokens guessed, and of them right.
    """

    request_id: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    scores: list[tuple[float, bool]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | None = None
    error: str | None = None
    by_request: bool = False
    reuse: Reuse | None = None
    selection: list[Selection] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


class TokenEvent(NamedTuple):
    """What a step of the engine has to say about a request.

    Attributes:
        request_id: whose event it is.
        token: the token that was generated, or None (a request that ended without another one).
        text: the text that is certain now: characters cut between tokens, and what may become a stop text,
            are held back.
        logprob: natural logarithm of the token's probability under the model's own distribution.
        top: the most likely tokens and their log-probabilities, if asked for.
        completion: the whole of the request, with its last event.
    """

    request_id: str
    token: int | None
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    completion: Completion | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended, with its last event."""
        return None if self.completion is None else self.completion.finish_reason


@dataclass(eq=False)
class Sequence:
    """One request while it runs.

    Attributes:
        tokens: prompt, then answer.
        num_prompt: tokens of the prompt.
        rule: which of its tokens attend sparsely.
        num_cached: tokens whose keys, values and states stand.
        pages: pages of the cached tokens, in order (the last one in part), and of those being computed.
        slot: slot of the states behind the cached tokens; -1 for none.
        last_slot: the one before, where the next states go if it is still free: a core has it at hand.
        marks: places, ascending, at which a snapshot is to be kept.
        draft: tokens guessed for the next step.
        arrival: number of its arrival, for order.
        namespace: whose texts it may continue from; its own can be continued from there only.
    """

    request_id: str
    tokens: array
    num_prompt: int
    params: SamplingParams
    rule: AttentionRule
    arrival: int
    namespace: str = ""
    num_cached: int = 0
    pages: array = field(default_factory=lambda: array("i"))
    slot: int = -1
    last_slot: int = -1
    marks: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    reuse: Reuse | None = None
    preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def output(self) -> array:
        return self.tokens[self.num_prompt :]

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not computed yet."""
        return len(self.tokens) - self.num_cached

    @property
    def is_reading(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return self.num_cached < self.num_prompt

    @property
    def reuse_limit(self) -> int:
        """How many of its first tokens need not be computed if they were before: all but the last one, and
        none behind which the prediction is asked for."""
        scored = self.params.score_from
        return self.num_tokens - 1 if scored is None else min(scored, self.num_tokens) - 1

    @property
    def room(self) -> int:
        """Tokens it may come to at most."""
        return self.num_prompt + self.params.max_tokens

    def is_sparse(self, place: int) -> bool:
        """Whether the token at this place attends sparsely: by the prompt's whole length, or by its own."""
        return self.rule.attends_sparsely(max(self.num_prompt, place + 1))

    def mode_end(self, place: int, end: int) -> int:
        """Where the run of tokens computed in the mode of `place` ends, `end` at the latest."""
        sparse = self.is_sparse(place)
        if self.is_sparse(end - 1) == sparse:
            return end
        return max(self.num_prompt, self.rule.dense_len - 1)

    def next_mark(self, end: int) -> int:
        """The first place behind what is cached where a snapshot is wanted, `end` at the latest."""
        return min((m for m in self.marks if m > self.num_cached), default=end)

    def uniform_length(self) -> int:
        """How many of the cached tokens a prompt of their own would have read in the same mode."""
        return self.mode_end(0, self.num_cached) if self.num_cached else 0


def common_length(a: array, b: array) -> int:
    """Tokens that two texts begin with alike."""
    x, y = np.frombuffer(a, np.int32), np.frombuffer(b, np.int32)
    short = min(len(x), len(y))
    different = x[:short] != y[:short]
    first = int(different.argmax()) if short else 0
    return first if short and different[first] else short


def as_token_ids(prompt: SequenceOf[int], vocab_size: int) -> array:
    """Token ids as the engine keeps them.

    Raises:
        ValueError: no tokens, or ids that the model does not have.
    """
    try:
        ids = array("i", prompt)
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"a prompt is a sequence of token ids, got {type(prompt).__name__}: {error}"
        ) from error
    if not ids:
        raise ValueError("the prompt is empty")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids must lie between 0 and {vocab_size - 1}, got {low if low < 0 else high}")
    return ids
