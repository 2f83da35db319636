"""The sentences that say a value as people write it, and the questions that ask for it, by kind of value.

A form belongs to one kind: statements, questions and the properties or verbs that both name. `written` puts
things and values into them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import values
from .values import listed


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


def _said(
    make: Callable[[random.Random], str],
    statement: str,
    question: str,
    attributes: str = "",
    things: str = "object",
) -> Form:
    """A sentence and its question, for verbs that a single way of asking fits."""
    return Form(make, (statement,), (question,), _attributes(attributes) if attributes else ("",), things)


def _measured_by(kind: str, statement: str, question: str, attributes: str = "") -> Form:
    return _said(lambda rng: values.measure(rng, kind), statement, question, attributes)


# Beside the forms above, whose attributes are nouns: what things do and what is done to them.
_VERBS: dict[str, tuple[Form, ...]] = {
    "number": (
        _said(
            values.number,
            "{thing_cap} has {value} {attribute}.",
            "How many {attribute} does {thing} have?",
            "seats|windows|steps|pages|rooms|employees|shelves|readers",
        ),
        _said(
            values.number,
            "At {thing} they counted {value} {attribute}.",
            "How many {attribute} were counted at {thing}?",
            "sheep|bicycles|stamps|swans|visitors|errors|coins",
        ),
    ),
    "price": (
        _said(
            values.price,
            "{thing_cap} fetched {value} at the auction.",
            "How much did {thing} fetch at the auction?",
        ),
        _said(
            values.price,
            "{attribute_cap} {thing} would come to {value}.",
            "How much would {attribute} {thing} come to?",
            "painting|moving|insuring|rebuilding|heating|renting",
        ),
    ),
    "date": (
        _said(
            values.date,
            "{thing_cap} stood empty until {value}.",
            "Until when did {thing} stand empty?",
        ),
        _said(
            values.date,
            "{attribute_cap} for {thing} ends on {value}.",
            "When does {attribute} for {thing} end?",
            "registration|the contract|insurance|the sale|voting|support",
        ),
    ),
    "time": (
        _said(
            values.clock,
            "Every evening {thing} is {attribute} at {value}.",
            "At what time is {thing} {attribute}?",
            "lit|locked|emptied|cleaned|switched off",
        ),
        _said(
            values.clock,
            "{thing_cap} lets visitors in from {value}.",
            "From what time does {thing} let visitors in?",
        ),
    ),
    "duration": (
        _said(values.duration, "{thing_cap} lasted {value}.", "How long did {thing} last?", things="task"),
        _said(
            values.duration,
            "{thing_cap} was {attribute} for {value}.",
            "How long was {thing} {attribute}?",
            "closed|rented out|under water|without power|on loan",
        ),
    ),
    "measure": (
        _measured_by(
            "length",
            "{thing_cap} is {value} {attribute}.",
            "How {attribute} is {thing}?",
            "long|wide|high|deep",
        ),
        _measured_by("weight", "{thing_cap} weighs {value}.", "How much does {thing} weigh?"),
        _measured_by("capacity", "{thing_cap} holds {value}.", "How much does {thing} hold?"),
        _measured_by(
            "temperature", "{thing_cap} is kept at {value}.", "At what temperature is {thing} kept?"
        ),
        _measured_by("speed", "{thing_cap} once reached {value}.", "What speed did {thing} once reach?"),
        _measured_by(
            "power", "{thing_cap} draws {value} at full load.", "How much does {thing} draw at full load?"
        ),
        _measured_by("storage", "{thing_cap} takes up {value}.", "How much space does {thing} take up?"),
        _measured_by("pressure", "{thing_cap} withstands {value}.", "What pressure does {thing} withstand?"),
    ),
    "percentage": (
        _said(
            values.percentage,
            "{value} of the {attribute} of {thing} were lost.",
            "What share of the {attribute} of {thing} were lost?",
            "books|tiles|records|letters|passengers|tickets",
        ),
    ),
    "version": (
        _said(
            values.version,
            "{thing_cap} was delivered with {attribute} {value}.",
            "Which {attribute} was {thing} delivered with?",
            "firmware|software|driver|kernel",
            "machine",
        ),
        _said(
            values.version,
            "{thing_cap} still uses release {value} of the {attribute}.",
            "Which release of the {attribute} does {thing} still use?",
            "library|compiler|protocol|client",
            "machine",
        ),
    ),
    "address": (
        _said(values.address, "{thing_cap} stands at {value}.", "Where does {thing} stand?"),
        _said(values.address, "Deliveries for {thing} go to {value}.", "Where do deliveries for {thing} go?"),
    ),
    "network": (
        _said(
            values.network, "{thing_cap} listens on {value}.", "Where does {thing} listen?", things="machine"
        ),
        _said(
            values.network,
            "News about {thing} can be read at {value}.",
            "Where can news about {thing} be read?",
        ),
    ),
    "code": (
        _said(values.code, "{thing_cap} is filed under {value}.", "Under which number is {thing} filed?"),
        _said(values.code, "{thing_cap} bears the mark {value}.", "Which mark does {thing} bear?"),
        _said(values.code, "To enter {thing}, type {value}.", "What must one type to enter {thing}?"),
    ),
    "phone": (
        _said(
            values.phone,
            "Questions about {thing} are answered on {value}.",
            "On which number are questions about {thing} answered?",
        ),
    ),
    "person": (
        _said(
            values.person,
            "{thing_cap} was {attribute} by {value}.",
            "Who {attribute} {thing}?",
            "designed|built|painted|bought|inherited|restored|described|leased",
        ),
        _said(values.person, "{value} looks after {thing}.", "Who looks after {thing}?"),
    ),
}
FORMS = {kind: (*forms, *_VERBS[kind]) for kind, forms in FORMS.items()}
