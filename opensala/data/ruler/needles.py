"""Needle tasks: statements that give keys their values, hidden in noise, in an essay, or among many like
them."""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice

from ..words import compound, invented_word
from .filler import filler, place
from .types import RulerDocument, RulerQuestion

_ATTRIBUTES = {
    "number": ("access code", "serial number", "badge number", "ticket number"),
    "uuid": ("registration key", "record key", "tracking key"),
}
_WEIGHTS = {"word": 12, "uuid": 48}  # closing words that a statement is worth
_CLOSING = (
    "That is all that was written down, and the rest of the page was left empty for those who would come "
    "later and find "
    "something worth adding to the list."
)


@dataclass(frozen=True)
class Needles:
    """Parameters of a needle task, as RULER names them.

    Attributes:
        haystack: `noise`, `essay`, or `needles` (every sentence is a statement like the one asked for).
        key, value: `word`, `number` or `uuid`.
        keys, values, queries: keys hidden, values of each key, keys asked for in one question.
    """

    haystack: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def build(self, size: int, rng: random.Random, questions: int, depth: float) -> RulerDocument:
        """A document of about `size` words with the asked keys spread over it, the first at `depth`."""
        attribute = rng.choice(_ATTRIBUTES[self.value])
        asked = questions * self.queries
        keys = distinct(lambda: _draw(self.key, rng), max(self.keys, asked))
        values = distinct(lambda: _draw(self.value, rng), len(keys) * self.values)
        depths = [(depth + i / asked) % 1 if i < asked else rng.random() for i in range(len(keys))]
        hidden = [
            (
                f"The {attribute} for {key} is {values[i * self.values + j]}.",
                depths[i] if j == 0 else rng.random(),
            )
            for i, key in enumerate(keys)
            for j in range(self.values)
        ]
        if self.haystack == "needles":
            body = self._all_needles(size, rng, attribute, hidden, {*keys}, {*values})
        else:
            body = place(filler(self.haystack, size, rng), [s for s, _ in hidden], [d for _, d in hidden])
        head = (
            f"Somewhere in the following text {attribute}s are given. Read it to the end, then answer "
            "the question about them.\n\n"
        )
        return RulerDocument(
            head + body,
            tuple(
                self._question(
                    attribute,
                    keys[n : n + self.queries],
                    values[n * self.values : (n + self.queries) * self.values],
                    depths[n],
                )
                for n in range(0, asked, self.queries)
            ),
        )

    def _all_needles(
        self,
        size: int,
        rng: random.Random,
        attribute: str,
        hidden: list[tuple[str, float]],
        keys: set[str],
        values: set[str],
    ) -> str:
        """As many further statements as fit, then closing words: a statement counts as many words as it has
        tokens, roughly, so that a document can grow in steps of one closing word."""
        weight = _WEIGHTS[self.key]
        others, left = divmod(max(0, size - weight * len(hidden)), weight)
        more_keys = distinct(lambda: _draw(self.key, rng), others, keys)
        more_values = distinct(lambda: _draw(self.value, rng), others, values)
        lines = [f"The {attribute} for {k} is {v}." for k, v in zip(more_keys, more_values, strict=True)]
        count = len(lines)
        for n, (statement, depth) in enumerate(sorted(hidden, key=lambda pair: pair[1])):
            lines.insert(round(depth * count) + n, statement)
        return "\n".join([*lines, " ".join(islice(cycle(_CLOSING.split()), left))]).strip()

    def _question(self, attribute: str, keys: list[str], values: list[str], depth: float) -> RulerQuestion:
        if len(keys) > 1:
            text = f"What are the {attribute}s for {', '.join(keys[:-1])} and {keys[-1]}? Give one for each."
        elif self.values > 1:
            text = f"What are all {self.values} {attribute}s for {keys[0]}? Give every one of them."
        else:
            text = f"What is the {attribute} for {keys[0]}?"
        return RulerQuestion(text, tuple(values), depth if len(values) == 1 else None)


def distinct(draw: Callable[[], str], count: int, taken: set[str] | None = None) -> list[str]:
    """`count` different draws, none of them in `taken`."""
    seen = set(taken or ())
    found: list[str] = []
    while len(found) < count:
        value = draw()
        if value not in seen:
            seen.add(value)
            found.append(value)
    return found


def _draw(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    # adjective and noun give 15,000 keys; a made-up word in every third one, many millions
    return compound(rng) if rng.random() < 0.67 else f"{compound(rng).split('-')[0]}-{invented_word(rng)}"
