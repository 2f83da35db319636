"""Facts as people write and ask them: a price, a date, an address, a version in a sentence of prose, and a
question in words of its own.

`facts` draws names and keys with numbers; here the values are those of `values`, the statements are sentences
that could stand in a letter or a manual, and the question need not repeat the statement's words. For every
document there are also questions whose fact is absent: about another thing, or about another property of a
thing that is there.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import values
from .facts import Fact
from .forms import FORMS, Form
from .values import listed
from .words import compound, invented_word

ABSENT = "not found"  # the answer to a question whose fact is not in the document
Words = Sequence[str]


WRITTEN_KINDS = tuple(FORMS)
# What may follow a value in its sentence, so that not only a full stop ends it.
_TAILS = listed(
    "at present|for now|as everybody knows|according to the minutes|on weekdays|this year|if all goes well|"
    "and nobody objected|which surprised the council|at least until spring|after the repair|in most years|"
    "as the letter says|including everything|to this day|and that is final|when it rains|by agreement|"
    "although some disagree|and has been for years"
)
_OBJECTS = listed(
    "bridge|boat|ferry|mill|pump|archive|workshop|greenhouse|lighthouse|tram|clinic|bakery|painting|"
    "piano|generator|warehouse|theatre|museum|garden|tower|cottage|chapel|laboratory|turbine|telescope|"
    "library|orchard|engine|gallery|dictionary|lease|contract|shipment|exhibition|reservoir|school"
)
_TITLES = ("Project", "Camp", "Station", "Hotel", "Model")
_PLACES = listed(
    "by the river|on the hill|in the north wing|behind the station|near the harbour|at the old mill|"
    "in bay 4|on the third floor"
)
_TASKS = listed(
    "cleaning the {noun}|the crossing to {town}|the drive to {town}|painting the {noun}|"
    "the backup of the {noun}|assembling the {noun}|the train to {town}|a walk around the {noun}|"
    "the inspection of the {noun}"
)
_MACHINES = listed("server|router|printer|terminal|gateway|cluster|workstation|controller|scanner|sensor")


def _noun(rng: random.Random, words: Words) -> str:
    if words and rng.random() < 0.25:
        return f"{rng.choice(words)} {rng.choice(_OBJECTS)}"
    return rng.choice(_OBJECTS)


def thing(rng: random.Random, kind: str = "object", words: Words = ()) -> str:
    """Something to have a property: an `object`, a `person`, a `machine` or a `task`."""
    place = values.town(rng)
    if kind == "person":
        return rng.choice(
            (values.person(rng), f"the {rng.choice(('baker', 'notary', 'surgeon', 'organist'))} of {place}")
        )
    if kind == "machine":
        return f"the {rng.choice((place, compound(rng)))} {rng.choice(_MACHINES)}"
    if kind == "task":
        return rng.choice(_TASKS).format(noun=_noun(rng, words), town=place)
    noun = _noun(rng, words)
    return rng.choice(
        (
            f"the {noun} {rng.choice(_PLACES)}",
            f"the {noun} in {place}",
            f"the {place} {noun}",
            f"the {compound(rng).replace('-', ' ')}",
            f"{values.person(rng)}'s {noun}",
            f"the {noun} to {place}",
            f"each {noun} of the {compound(rng).split('-')[0]} series",
            f"the {rng.choice(('first', 'second', 'third', 'old', 'new', 'last'))} {noun}",
            f"the {noun} called {invented_word(rng).capitalize()}",
            f"{rng.choice(_TITLES)} {invented_word(rng).capitalize()}",
        )
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class _Subject:
    """What a fact is about: its form, its attribute and its thing."""

    kind: str
    form: Form
    attribute: str
    thing: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Facts with the same key would answer each other's questions."""
        return (self.kind if self.form.attributes == ("",) else "", self.attribute, self.thing)

    def question(self, rng: random.Random) -> str:
        return rng.choice(self.form.questions).format(thing=self.thing, attribute=self.attribute)

    def fact(self, rng: random.Random) -> Fact:
        value = self.form.make(rng)
        statement = rng.choice(self.form.statements).format(
            thing=self.thing,
            thing_cap=_capital(self.thing),
            attribute=self.attribute,
            attribute_cap=_capital(self.attribute),
            value=value,
        )
        if statement.endswith(f"{value}.") and rng.random() < 0.3:
            statement = f"{statement[:-1]}{rng.choice((' ', ', '))}{rng.choice(_TAILS)}."
        statement = statement.replace("..", ".")  # after a value that ends with a full stop
        return Fact(statement, self.question(rng), value, kind=self.kind)


def _subject(
    rng: random.Random, words: Words, kind: str | None = None, thing_: str | None = None
) -> _Subject:
    kind = kind or rng.choice(WRITTEN_KINDS)
    form = rng.choice(FORMS[kind])
    return _Subject(kind, form, rng.choice(form.attributes), thing_ or thing(rng, form.things, words))


def written_fact(rng: random.Random, words: Words = (), kind: str | None = None) -> Fact:
    """One fact, of a kind of WRITTEN_KINDS. `words` are real words to draw from beside the built-in lists."""
    return _subject(rng, words, kind).fact(rng)


def revalued(rng: random.Random, fact: Fact, kind: str | None = None) -> Fact:
    """The fact with another value, of a kind of WRITTEN_KINDS (drawn if not given).

    Nothing about the property then tells what its value looks like (the mayor of a town may be `$1,250`), so
    that values are copied as they stand instead of being written as such properties usually are.
    """
    kind = kind or rng.choice(WRITTEN_KINDS)
    value = rng.choice(FORMS[kind]).make(rng)
    before, _, after = fact.statement.rpartition(fact.answer)
    after = after.removeprefix(".") if value.endswith(".") else after
    return replace(fact, statement=f"{before}{value}{after}", answer=value, kind=kind)


@dataclass(frozen=True)
class WrittenFacts:
    """Facts to hide, and questions about what is not among them, each a Fact with an empty statement and
    ABSENT for an answer."""

    facts: list[Fact]
    absent: list[Fact]


def written_facts(
    rng: random.Random, count: int, absent: int = 0, words: Words = (), kinds: Words = ()
) -> WrittenFacts:
    """`count` facts that do not answer each other's questions, and `absent` questions without a fact.

    In half of the calls many facts share a kind or a thing, so that only the whole question tells them apart.
    Half of the absent questions name a thing that has other facts, the others a thing that has none.

    Args:
        kinds: of WRITTEN_KINDS, to draw from; all if empty.
    """
    kinds = kinds or WRITTEN_KINDS
    alike = rng.random() < 0.5
    common = rng.choice(kinds)
    subjects: dict[tuple[str, str, str], _Subject] = {}
    while len(subjects) < count:
        drawn = rng.random() if alike else 1.0
        kind = common if drawn < 0.4 else rng.choice(kinds)
        form_thing = None
        if 0.4 <= drawn < 0.7 and subjects:
            other = rng.choice(list(subjects.values()))
            form_thing = other.thing if any(f.things == other.form.things for f in FORMS[kind]) else None
        new = _subject(rng, words, kind, form_thing)
        subjects.setdefault(new.key, new)
    chosen = list(subjects.values())[:count]
    return WrittenFacts([s.fact(rng) for s in chosen], _absent(rng, chosen, absent, words, kinds))


def _absent(
    rng: random.Random, present: list[_Subject], count: int, words: Words, kinds: Words
) -> list[Fact]:
    taken = {subject.key for subject in present}
    found: list[Fact] = []
    while len(found) < count:
        near = rng.choice(present) if present and rng.random() < 0.7 else None
        if near is None:
            new = _subject(rng, words, rng.choice(kinds))
        elif rng.random() < 0.5:  # the same question about another thing
            new = _Subject(near.kind, near.form, near.attribute, thing(rng, near.form.things, words))
        else:  # another question about the same thing
            new = _subject(rng, words, rng.choice(kinds), near.thing)
            if new.form.things != near.form.things:
                continue
        if new.key not in taken:
            taken.add(new.key)
            found.append(Fact("", new.question(rng), ABSENT, kind=new.kind))
    return found
