"""Answers of a given form: a JSON Schema or a grammar, enforced as a mask over the next token.

The mask comes from llguidance (MIT, in the extra `serve`): of the tokens that the model could choose, those
are left that can still lead to a text of the grammar. What the library cannot enforce it refuses, and so do
we: a schema that is enforced in part would be silently wrong. This module knows tokens and texts, but no
model.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LONGEST = 256 << 10  # characters of a grammar; OpenAI's own limit is 120,000 for the names in a schema
_KEPT = 64  # compiled grammars: the same one is asked for again and again
# At most one space or one indented line where JSON allows any blanks: a model that does not know how to go on
# would write them for ever.
_BLANKS = r" ?|\n {0,16}"


@dataclass(frozen=True)
class Grammar:
    """The form that an answer must have.

    Attributes:
        text: as llguidance reads it: JSON with a schema in it, or its dialect of Lark.
    """

    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "Grammar":
        """JSON that a schema (draft 2020-12) allows. Properties come in the schema's order."""
        return cls(json.dumps({"grammars": [{"json_schema": with_blanks(schema)}]}))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})


def with_blanks(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with our rule for blanks, in place of options of the library that a caller may have put in."""
    return {**schema, "x-guidance": {"whitespace_pattern": _BLANKS}}


class GrammarTooComplex(ValueError):
    """A grammar whose next tokens cannot be worked out within the library's limits."""


class Guide:
    """Where one answer stands in its grammar.

    Args:
        matcher: of llguidance; nobody else may use it.
        vocab_size: of the model.
        end_ids: tokens at which a text ends.

    Attributes:
        taken: tokens of the answer that it has seen.
    """

    def __init__(self, matcher: Any, vocab_size: int, end_ids: SequenceOf[int]) -> None:
        self._matcher, self._vocab_size, self._end_ids = matcher, vocab_size, end_ids
        self.taken, self._ended = 0, 0

    def rewind(self, place: int) -> None:
        """Go back to behind the answer's first `place` tokens: a step that was discarded had gone further."""
        back = self.taken - place
        if back > 0:
            done = self._matcher.rollback(back - self._ended)
            assert done, "nothing of it failed"
            self.taken, self._ended = place, 0

    def allowed(self) -> Tensor:
        """`[V]` of bool on the CPU, which tokens may come next; at least one.

        Raises:
            GrammarTooComplex: it is, from here on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)
        if self._matcher.is_error() or not mask.any():
            why = self._matcher.get_error() or "no token may follow"
            raise GrammarTooComplex(
                f"the grammar cannot be enforced behind token {self.taken} of the answer: {why}"
            )
        return torch.from_numpy(mask)

    def take(self, token: int) -> None:
        """Note the answer's next token, which was allowed."""
        # llguidance 1.9 goes astray where an end of text is rolled back: it never hears of one.
        self._ended = int(token in self._end_ids)
        if not self._ended:
            accepted = self._matcher.consume_token(token)
            assert accepted, "only tokens that are allowed are taken"
        self.taken += 1

    def check(self, draft: SequenceOf[int]) -> int:
        """How many tokens of a draft the grammar allows, from the first one on."""
        return self._matcher.validate_tokens(list(draft))


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the latest.

    Args:
        tokenizer: of transformers; None for an engine without one.
        vocab_size: of the model.
        end_ids: tokens at which a text ends: allowed where the grammar may end.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, sorted(end_ids)
        self._lock = threading.Lock()  # a server compiles beside the engine's thread
        self._new: Callable[[str], Any] | None = None
        self._special: dict[str, int] = {}  # tokens that text never becomes, by how they are written
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def guide(self, grammar: Grammar) -> Guide:
        """A guide for one answer, at its beginning.

        Raises:
            ValueError: llguidance is not installed; no tokenizer, or one that it cannot read; a model without
                end of text; a grammar that is wrong, too large, or more than can be enforced.
        """
        return Guide(self.compile(grammar).deep_copy(), self._vocab_size, self._end_ids)

    def compile(self, grammar: Grammar) -> Any:
        """The compiled grammar, to be copied and not to be used itself; see `guide`."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
            if len(grammar.text) > _LONGEST:
                raise ValueError(
                    f"grammar has {len(grammar.text):,} characters, at most {_LONGEST:,} are taken: "
                    "shorten the schema"
                )
            self._new = self._new or self._prepare()
            matcher = self._new(grammar.text)
            if matcher.is_error():
                raise ValueError(f"grammar cannot be enforced: {matcher.get_error()[:500]}")
            warnings = matcher.get_grammar_warnings()
            if warnings:  # something of it would be left out
                raise ValueError(f"grammar cannot be enforced in full: {'; '.join(warnings)[:500]}")
            self._compiled[grammar] = matcher
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return matcher

    def literal(self, text: str) -> str:
        """How a grammar says this text: its special tokens by number, the rest in quotes.

        Raises:
            ValueError: see `guide`.
        """
        with self._lock:
            self._new = self._new or self._prepare()
        names = sorted(self._special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        said = [
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part)
            for part in parts
            if part
        ]
        return " ".join(said) or '""'

    def _prepare(self) -> Callable[[str], Any]:
        """What makes a matcher of a grammar's text; takes about a second for a vocabulary of 128K."""
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ValueError(
                "grammar needs the package llguidance: pip install 'opensala[serve]', or leave the form of "
                "the answer free"
            ) from error
        if self._tokenizer is None or not self._tokenizer.is_fast:
            raise ValueError("grammar needs an engine with a fast tokenizer (a tokenizer.json)")
        if not self._end_ids:
            raise ValueError("grammar needs a model with an end of text, and this one's config has none")
        tokens = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._end_ids)
        added = self._tokenizer.get_added_vocab()
        self._special = {text: n for text, n in added.items() if tokens.is_special_token(n)}
        limits = llguidance.LLParserLimits(verbose_errors=False)

        def new(text: str) -> Any:
            return llguidance.LLMatcher(tokens, text, limits=limits, log_level=0)

        return new
