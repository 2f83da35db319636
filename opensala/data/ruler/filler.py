"""What needles are hidden in: sentences that continue for as long as is asked, and placing statements among
them.

Lengths are in words, so that a document can be made longer in small steps. It knows nothing of tokens.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, cycle, islice

from ..text import prose

_NOISE = (
    "The rain has stopped.",
    "A cart rolls slowly by.",
    "Nobody here is in a hurry.",
    "The lamp is lit again.",
    "Somewhere a door is shut.",
    "Bread is cooling on the sill.",
)
_ESSAY_WORDS = 100_000  # then it starts over: a text of a million tokens repeats it some eight times
_MOST_WORDS = 60  # of a sentence: what is longer is a table or a listing
_PARAGRAPH = 6  # sentences


class Essay:
    """Sentences of the standard library's prose, read as far as they are needed; they start over when they
    run out."""

    def __init__(self) -> None:
        self._source = self._read()
        self._sentences: list[str] = []
        self._counts: list[int] = []
        self._words = 0
        self._extend(50_000)
        self._starts = len(self._sentences)  # where a text may begin, whatever was read since

    def sentences(self, words: int, rng: random.Random) -> list[str]:
        """Sentences of at least `words` words together, from a place drawn from `rng`."""
        start = rng.randrange(self._starts)
        self._extend(min(words + sum(self._counts[:start]), _ESSAY_WORDS))
        taken, total, at = [], 0, start
        while total < words:
            taken.append(self._sentences[at])
            total += self._counts[at]
            at = (at + 1) % len(self._sentences)
        return taken

    def _extend(self, words: int) -> None:
        while self._words < words:
            more = next(self._source, None)
            if more is None:
                return
            self._sentences.append(more)
            self._counts.append(more.count(" ") + 1)
            self._words += self._counts[-1]

    @staticmethod
    def _read() -> Iterator[str]:
        for text in prose():
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
                letters = sum(c.isalpha() or c in " ,.'" for c in sentence)
                if (
                    sentence[:1].isupper()
                    and sentence[-1] in ".!?"
                    and letters > 0.95 * len(sentence)
                    and 4 <= sentence.count(" ") + 1 <= _MOST_WORDS
                ):
                    yield sentence


@lru_cache(maxsize=1)
def essay() -> Essay:
    """The one essay of this process: reading it takes a second, so it is read once."""
    return Essay()


def filler(kind: str, words: int, rng: random.Random) -> list[str]:
    """Sentences (`noise` or `essay`) of exactly `words` words together; the last one may be cut."""
    sentences = (
        list(
            islice(
                cycle(_NOISE), 1 + words * len(_NOISE) // sum(s.count(" ") + 1 for s in _NOISE) + len(_NOISE)
            )
        )
        if kind == "noise"
        else essay().sentences(words, rng)
    )
    ends = list(accumulate(s.count(" ") + 1 for s in sentences))
    last = bisect_left(ends, words)
    left = words - (ends[last - 1] if last else 0)
    return [*sentences[:last], " ".join(sentences[last].split(" ")[:left])]


def place(sentences: Sequence[str], statements: Sequence[str], depths: Sequence[float]) -> str:
    """Put statement i before the sentence at `depths[i]` (0 start, 1 end) of the words; six sentences a
    paragraph."""
    ends = list(accumulate((s.count(" ") + 1 for s in sentences), initial=0))
    at: dict[int, list[str]] = {}
    for statement, depth in sorted(zip(statements, depths, strict=True), key=lambda pair: pair[1]):
        at.setdefault(min(bisect_left(ends, depth * ends[-1]), len(sentences) - 1), []).append(statement)
    parts: list[str] = []
    for i, sentence in enumerate(sentences):
        parts += at.get(i, [])
        parts.append(sentence)
        parts.append("\n" if i % _PARAGRAPH == _PARAGRAPH - 1 else "")
    return re.sub(r" ?\n ?", "\n", " ".join(p for p in parts if p)).strip()
