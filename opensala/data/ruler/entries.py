"""Question answering over many short entries about people and companies that do not exist.

One hop: the answer stands in the entry of what is asked for. Two hops: the entry of a company names its
founder, the founder's own entry has the answer. Unlike real encyclopedia text, nothing of it can be known
beforehand.
"""

import random
from dataclasses import dataclass
from itertools import cycle, islice

from ..words import invented_word
from .needles import distinct
from .types import RulerDocument, RulerQuestion

_MAKES = (
    "clocks",
    "sails",
    "bicycles",
    "lenses",
    "pumps",
    "violins",
    "tents",
    "kettles",
    "engines",
    "maps",
    "gloves",
    "paper",
)
_WORK = (
    "a surveyor",
    "a teacher",
    "a pilot",
    "a botanist",
    "a printer",
    "a nurse",
    "a judge",
    "a composer",
    "a carpenter",
    "an editor",
)
_LIKES = (
    "rowing",
    "chess",
    "long walks",
    "old coins",
    "beekeeping",
    "choral music",
    "astronomy",
    "mountain huts",
)
_CLOSING = (
    "Further entries are being prepared and will be added as soon as they have been read and corrected by "
    "the two editors "
    "who look after this collection and answer all letters that reach them."
)

# closing words that two entries are worth: more than their tokens, so that lengths grow by single words
_PAIR = 150


@dataclass(frozen=True)
class _Pair:
    """A company and the person who founded it."""

    company: str
    makes: str
    seat: str
    year: int
    staff: int
    founder: str
    birthplace: str
    work: str
    likes: str

    @property
    def company_entry(self) -> str:
        return (
            f"{self.company} is a maker of {self.makes} with its seat in {self.seat}. It was founded in "
            f"{self.year} by "
            f"{self.founder} and has {self.staff} employees. Most of its {self.makes} are sold abroad."
        )

    @property
    def founder_entry(self) -> str:
        return (
            f"{self.founder} was born in {self.birthplace} and worked as {self.work} before going into "
            "business. "
            f"Friends remember a love of {self.likes}."
        )


@dataclass(frozen=True)
class Entries:
    """`hops`: 1 asks what one entry says, 2 asks across two."""

    hops: int = 1

    def build(self, size: int, rng: random.Random, questions: int, depth: float) -> RulerDocument:
        """A document of about `size` words; the entry with the first answer lies at `depth`."""
        others, left = divmod(max(0, size - questions * _PAIR), _PAIR)
        pairs = _pairs(rng, questions + others)
        asked = pairs[:questions]
        entries = [e for pair in pairs[questions:] for e in (pair.company_entry, pair.founder_entry)]
        rng.shuffle(entries)
        depths = [(depth + i / questions) % 1 for i in range(questions)]
        for pair in asked:
            entries.insert(
                rng.randrange(len(entries) + 1), pair.company_entry if self.hops == 2 else pair.founder_entry
            )
        count = len(entries)
        for n, (at, pair) in enumerate(sorted(zip(depths, asked, strict=True), key=lambda x: x[0])):
            entries.insert(
                round(at * count) + n, pair.founder_entry if self.hops == 2 else pair.company_entry
            )
        body = "\n\n".join(f"Entry {i}\n{entry}" for i, entry in enumerate(entries, 1))
        rest = islice(cycle(_CLOSING.split()), left)
        head = (
            "Here are entries of an encyclopedia. The answer to the question after them stands in "
            "them; answer with nothing but it.\n\n"
        )
        text = f"{head}{body}\n\n{' '.join(rest)}".strip()
        found = [
            text.index(pair.founder_entry if self.hops == 2 else pair.company_entry) / len(text)
            for pair in asked
        ]
        return RulerDocument(
            text, tuple(self._question(pair, rng, at) for pair, at in zip(asked, found, strict=True))
        )

    def _question(self, pair: _Pair, rng: random.Random, depth: float) -> RulerQuestion:
        if self.hops == 2:
            return RulerQuestion(
                f"In which town was the founder of {pair.company} born?", (pair.birthplace,), depth
            )
        return rng.choice(
            (
                RulerQuestion(f"Who founded {pair.company}?", (pair.founder, pair.founder.split()[1]), depth),
                RulerQuestion(f"In which town does {pair.company} have its seat?", (pair.seat,), depth),
                RulerQuestion(f"In which year was {pair.company} founded?", (str(pair.year),), depth),
                RulerQuestion(f"How many employees does {pair.company} have?", (str(pair.staff),), depth),
            )
        )


def _pairs(rng: random.Random, count: int) -> list[_Pair]:
    def name() -> str:
        return invented_word(rng).capitalize()

    companies = distinct(name, count)
    founders = distinct(lambda: f"{name()} {name()}", count)
    return [
        _Pair(
            f"{company} {rng.choice(('Works', 'Brothers', 'Company'))}",
            rng.choice(_MAKES),
            name(),
            rng.randrange(1790, 2000),
            rng.randrange(101, 9999),
            founder,
            name(),
            rng.choice(_WORK),
            rng.choice(_LIKES),
        )
        for company, founder in zip(companies, founders, strict=True)
    ]
