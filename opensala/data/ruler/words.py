"""Counting tasks: the words that stand most often in a list, the coded words most frequent in a text."""

import random
import string
from dataclasses import dataclass

from ..words import invented_word, plain_words
from .needles import distinct
from .types import RulerDocument, RulerQuestion

_ZETA_2 = 1.6449340668482264  # sum of 1/k^2: the share of rank k is k^-2 / this


@dataclass(frozen=True)
class CommonWords:
    """`common` words stand in the list often, all others seldom: 30 and 3 times, in short lists 6 and once.

    Attributes:
        long_from: seldom entries from which a list is long. Where it becomes long, it also becomes a thousand
            tokens longer.
    """

    common: int = 10
    long_from: int = 400

    def build(self, size: int, rng: random.Random, questions: int, depth: float) -> RulerDocument:
        """A list in which `size` entries are seldom words; one question only."""
        often, seldom = (30, 3) if size >= self.long_from else (6, 1)
        example, shown = self._numbered(rng, 20, 3, 1)
        listed, wanted = self._numbered(rng, size, often, seldom)
        head = (
            f"Below is a numbered list of words. {self.common} of them stand in it much more often than "
            "the others.\n\n"
            f"First an example.\n{example}\nQuestion: {self._ask()}\nAnswer: {', '.join(shown)}\n\nNow "
            "the list to answer about.\n"
        )
        return RulerDocument(head + listed, (RulerQuestion(self._ask(), tuple(wanted)),))

    def _ask(self) -> str:
        return f"Which {self.common} words stand in the list most often?"

    def _numbered(
        self, rng: random.Random, seldom_entries: int, often: int, seldom: int
    ) -> tuple[str, list[str]]:
        words = rng.sample(plain_words(), min(len(plain_words()), self.common + -(-seldom_entries // seldom)))
        missing = self.common + -(-seldom_entries // seldom) - len(words)
        words += distinct(lambda: invented_word(rng), missing, set(words))
        wanted, others = words[: self.common], words[self.common :]
        entries = wanted * often + (others * seldom)[:seldom_entries]
        rng.shuffle(entries)
        return " ".join(f"{i}. {w}" for i, w in enumerate(entries, 1)), wanted


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose frequency falls with the square of their rank; rank 1 is a row of dots, 2 to 4 are
    asked for."""

    letters: int = 6

    def build(self, size: int, rng: random.Random, questions: int, depth: float) -> RulerDocument:
        """A text of about `size` coded words; one question only."""
        counts = [max(1, round(size / _ZETA_2 / rank**2)) for rank in range(1, max(5, size // 25))]
        while len(counts) > 4 and sum(counts) > size:
            counts.pop()
        codes = distinct(
            lambda: "".join(rng.choices(string.ascii_lowercase, k=self.letters)), len(counts) - 1
        )
        words = ["....."] * counts[0] + [
            code for code, n in zip(codes, counts[1:], strict=True) for _ in range(n)
        ]
        spare = max(0, size - len(words))
        words += distinct(
            lambda: "".join(rng.choices(string.ascii_lowercase, k=self.letters)), spare, set(codes)
        )
        rng.shuffle(words)
        head = (
            "The following text is written in coded words. Keep count of them; rows of dots are no words.\n\n"
        )
        question = RulerQuestion(
            "Which three coded words stand in the text most often, leaving out the dots?", tuple(codes[:3])
        )
        return RulerDocument(head + " ".join(words), (question,))
