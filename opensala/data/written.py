"""Facts as people write and ask them: a price, a date, an address, a version in a sentence of prose, and a
question in words of its own.

`facts` draws names and keys with numbers; here the values are those of `values`, the statements are sentences
that could stand in a letter or a manual, and the question need not repeat the statement's words. For every
document there are also questions whose fact is absent: about another thing, or about another property of a
thing that is there.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from . import values
from .facts import Fact, compound, invented_word
from .values import listed

ABSENT = "not found"  # the answer to a question whose fact is not in the document
Words = Sequence[str]


@dataclass(frozen=True)
class Form:
    """One way to say a kind of fact: `{thing}`, `{attribute}` and `{value}` are filled in.

    `statements` and `questions` belong together: any question asks what any statement says.
    """

    make: Callable[[random.Random], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    attributes: tuple[str, ...] = ("",)
    things: str = "object"


_NAMED = (
    "The {attribute} of {thing} is {value}.",
    "The {attribute} of {thing} is {value}.",
    "Please note that the {attribute} of {thing} is {value}.",
    "For {thing}, the {attribute} was given as {value}.",
    "According to the register, {thing} has {value} as its {attribute}.",
    "{attribute_cap} of {thing}: {value}",
)
_ASKED = (
    "What is the {attribute} of {thing}?",
    "What is the {attribute} of {thing}?",
    "Which {attribute} is given for {thing}?",
    "What does the text give as the {attribute} of {thing}?",
)


def _attributes(text: str) -> tuple[str, ...]:
    return tuple(listed(text))


def _measured(kind: str, attributes: str) -> Form:
    return Form(lambda rng: values.measure(rng, kind), _NAMED, _ASKED, _attributes(attributes))


FORMS: dict[str, tuple[Form, ...]] = {
    "number": (
        Form(
            values.number,
            _NAMED,
            _ASKED,
            _attributes("population|serial number|account number|score|number of members|index|mass ratio"),
        ),
    ),
    "price": (
        Form(
            values.price,
            (
                "{thing_cap} costs {value}.",
                "{thing_cap} was sold for {value}.",
                "They asked {value} for {thing}.",
                "The price of {thing} has been set at {value}.",
            ),
            ("How much does {thing} cost?", "What is the price of {thing}?", "How much is {thing}?"),
        ),
        Form(
            values.price,
            _NAMED,
            _ASKED,
            _attributes("deposit|monthly fee|annual budget|rent|repair cost|fine"),
        ),
    ),
    "date": (
        Form(
            values.date,
            (
                "{thing_cap} was {attribute} on {value}.",
                "It was on {value} that {thing} was {attribute}.",
                "The records show that {thing} was {attribute} on {value}.",
            ),
            ("When was {thing} {attribute}?", "On what date was {thing} {attribute}?"),
            _attributes("opened|repaired|delivered|inspected|sold|completed|founded|closed"),
        ),
    ),
    "time": (
        Form(
            values.clock,
            (
                "{thing_cap} {attribute} at {value}.",
                "Remember that {thing} {attribute} at {value}.",
                "On most days {thing} {attribute} at {value}.",
            ),
            ("At what time is it that {thing} {attribute}?", "When is it that {thing} {attribute}?"),
            _attributes("opens|closes|leaves|starts|arrives"),
        ),
    ),
    "duration": (
        Form(
            values.duration,
            (
                "{thing_cap} takes {value}.",
                "One should allow {value} for {thing}.",
                "In practice {thing} takes {value}.",
            ),
            ("How long does {thing} take?", "How much time does {thing} take?"),
            things="task",
        ),
        Form(
            values.duration,
            _NAMED,
            _ASKED,
            _attributes("timeout|warranty|retention period|age|service interval"),
        ),
    ),
    "measure": (
        _measured("weight", "weight|payload|mass"),
        _measured("length", "length|height|width|depth|range"),
        _measured("speed", "top speed|average speed"),
        _measured("temperature", "operating temperature|temperature|melting point"),
        _measured("voltage", "supply voltage|voltage"),
        _measured("power", "power|rated output"),
        _measured("frequency", "frequency|clock rate"),
        _measured("capacity", "capacity|volume|tank volume"),
        _measured("storage", "file size|memory limit|disk quota"),
        _measured("pressure", "pressure|test pressure"),
        _measured("area", "area|floor area"),
    ),
    "percentage": (
        Form(
            values.percentage,
            _NAMED,
            _ASKED,
            _attributes("share|interest rate|yield|error rate|humidity|discount"),
        ),
    ),
    "version": (
        Form(
            values.version,
            (
                "{thing_cap} runs version {value}.",
                "The version installed on {thing} is {value}.",
                "{thing_cap} was upgraded to version {value}.",
            ),
            ("Which version does {thing} run?", "What version is installed on {thing}?"),
            things="machine",
        ),
    ),
    "address": (
        Form(
            values.address,
            (
                "{thing_cap} lives at {value}.",
                "The address of {thing} is {value}.",
                "Letters to {thing} should be sent to {value}.",
            ),
            ("What is the address of {thing}?", "Where does {thing} live?"),
            things="person",
        ),
    ),
    "network": (
        Form(
            values.network,
            _NAMED,
            _ASKED,
            _attributes("address|endpoint|contact|location|URL"),
            things="machine",
        ),
    ),
    "code": (
        Form(
            values.code,
            (*_NAMED, "{thing_cap} can be opened with {attribute} {value}."),
            _ASKED,
            _attributes(
                "access code|booking code|part number|registration|licence key|order number|ticket number"
            ),
        ),
    ),
    "phone": (
        Form(
            values.phone,
            ("{thing_cap} can be reached on {value}.", "The phone number of {thing} is {value}."),
            ("What is the phone number of {thing}?", "On which number can {thing} be reached?"),
            things="person",
        ),
    ),
    "person": (
        Form(
            values.person,
            (
                "{thing_cap} is managed by {value}.",
                "The person in charge of {thing} is {value}.",
                "{value} is in charge of {thing}.",
            ),
            ("Who is in charge of {thing}?", "Who manages {thing}?"),
        ),
        Form(
            values.person,
            ("The {attribute} of {thing} is {value}.", "{value} is the {attribute} of {thing}."),
            ("Who is the {attribute} of {thing}?",),
            _attributes("owner|author|captain|editor|chief engineer|founder|treasurer"),
        ),
    ),
}
WRITTEN_KINDS = tuple(FORMS)
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
