"""From the engine's events to what the APIs say: texts, log-probabilities, usage."""

from dataclasses import dataclass
from typing import Any

from ..engine import Completion, FinishReason, TokenEvent
from ..engine.calls import Part, Text


@dataclass
class Trimmer:
    """Takes blanks from both ends of a text that comes piece by piece, where they belong to the form of the
    prompt and not to the answer."""

    active: bool
    _begun: bool = False
    _held: str = ""

    def add(self, text: str) -> str:
        if not self.active:
            return text
        text = self._held + (text if self._begun else text.lstrip())
        kept = text.rstrip()
        self._begun, self._held = self._begun or bool(kept), text[len(kept) :]
        return kept


class TextReader:
    """An answer that is nothing but text.

    Args:
        trims: see `Trimmer`.
    """

    def __init__(self, trims: bool) -> None:
        self._trimmer = Trimmer(trims)

    def add(self, text: str, last: bool = False) -> list[Part]:
        """Take the next piece; returns what it adds to the answer."""
        text = self._trimmer.add(text)
        return [Text(text)] if text else []


@dataclass
class Piece:
    """One event of one choice: what it adds, and the completion if it is the last."""

    index: int
    parts: list[Part]
    event: TokenEvent

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def completion(self) -> Completion | None:
        return self.event.completion


@dataclass
class Usage:
    """Tokens of a request with all its choices.

    Attributes:
        prompt: of the prompts, each counted once.
        cached: of them, those that were not read again.
        restored: of these, those that were read before the server was started.
        new: generated.
        why: why the rest of the first prompt was read.
    """

    prompt: int = 0
    cached: int = 0
    restored: int = 0
    new: int = 0
    why: str = ""

    def add(self, done: Completion) -> None:
        """Count what one choice generated."""
        self.new += len(done.tokens)

    def account(self, done: Completion) -> None:
        """Count what was at hand of a prompt; once for each prompt."""
        if done.reuse is not None:
            self.cached += done.reuse.reused
            self.restored += done.reuse.restored
            self.why = self.why or done.reuse.why

    @property
    def extension(self) -> dict[str, Any]:
        """What no API has a field for."""
        restored = {"restored_tokens": self.restored} if self.restored else {}
        return {"read_tokens": self.prompt - self.cached, **restored, "read_because": self.why}

    def openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "opensala": self.extension,
        }

    def responses(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.new,
            "opensala": self.extension,
        }

    def anthropic(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt - self.cached,
            "cache_creation_input_tokens": 0,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "cache_read_input_tokens": self.cached,
            "output_tokens": self.new,
            "output_tokens_details": None,
            "server_tool_use": None,
            "service_tier": "standard",
            "inference_geo": None,
            **({"opensala": self.extension} if self.why else {}),  # not before it is known
        }


class TokenTexts:
    """Tokens as the APIs show them beside their log-probabilities.

    Args:
        tokenizer: of transformers.
        end_ids: tokens at which a text ends; they are no part of it.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self._tokenizer, self._ends = tokenizer, end_ids

    def text(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def is_shown(self, event: TokenEvent, stop_ids: list[int]) -> bool:
        """Whether the event's token is part of the answer."""
        ended = event.finish_reason is FinishReason.STOP
        return event.token is not None and not (ended and event.token in self._ends.union(stop_ids))

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """OpenAI's form; a token that is a part of a character has no bytes to show."""
        text = self.text(token)
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }

    def logprob(self, event: TokenEvent) -> dict[str, Any]:
        assert event.token is not None and event.logprob is not None, "is_shown was asked"
        top = [self.entry(token, logprob) for token, logprob in event.top]
        return {**self.entry(event.token, event.logprob), "top_logprobs": top}


def openai_finish(reason: FinishReason | None, called: bool = False) -> str:
    """OpenAI's word for the end of a choice, which called a tool or not."""
    if called and reason is FinishReason.STOP:
        return "tool_calls"
    return "length" if reason is FinishReason.LENGTH else "stop"
