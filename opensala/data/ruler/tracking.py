"""Variable tracking: a value handed on from variable to variable, the assignments far apart in noise."""

import random
import string
from dataclasses import dataclass

from .filler import filler, place
from .needles import distinct
from .types import RulerDocument, RulerQuestion

_EXAMPLE_WORDS = 60


@dataclass(frozen=True)
class Tracking:
    """`hops`: how often the value is handed on; every question asks for one chain of hops + 1 variables."""

    hops: int = 4

    def build(self, size: int, rng: random.Random, questions: int, depth: float) -> RulerDocument:
        """A document of about `size` words with one chain for each question."""
        example = self._text(_EXAMPLE_WORDS, rng, 1, 3)
        text = self._text(size, rng, questions, 5)
        shown = example.questions[0]
        head = (
            "In the texts below, variables are given values: a number, or the value of another variable.\n\n"
            f"First an example.\n{example.text}\nQuestion: {shown.text}\nAnswer: "
            f"{', '.join(shown.references)}\n\n"
            "Now the text to answer about.\n"
        )
        return RulerDocument(head + text.text, text.questions)

    def _text(self, words: int, rng: random.Random, chains: int, letters: int) -> RulerDocument:
        count = self.hops + 1
        names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), chains * count)
        values = distinct(lambda: str(rng.randrange(10_000, 100_000)), chains)
        statements, depths, questions = [], [], []
        for i, value in enumerate(values):
            chain = names[i * count : (i + 1) * count]
            statements += [f"Set {chain[0]} to {value}."]
            statements += [
                f"Set {new} to the value of {old}." for old, new in zip(chain, chain[1:], strict=False)
            ]
            depths += sorted(rng.random() for _ in chain)
            questions.append(
                RulerQuestion(
                    f"Which {count} variables hold the value {value} in the end? Name all of them.",
                    tuple(chain),
                )
            )
        return RulerDocument(place(filler("noise", words, rng), statements, depths), tuple(questions))
