"""Facts to hide in a document, the questions that ask for them, and the answers: the one generator that
training, demonstrations, probes and evaluations share.

A fact is one sentence or one line of code: an attribute of something has a value. The question repeats the
words of the fact. Names, attributes and values are drawn so widely that they cannot be known beforehand.
It knows nothing of tokens or documents.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .words import (
    ADJECTIVES,
    CODE_PARTS,
    NAME_ATTRIBUTES,
    NOUNS,
    NUMBER_ATTRIBUTES,
    TITLES,
    WHO,
    invented_word,
)

Words = Sequence[str]


@dataclass(frozen=True)
class Fact:
    """A statement to hide, the question that asks for it, and the answer the question expects.

    `line` says that the statement is a line of its own (code, key-value) rather than a sentence; `kind` names
    the kind of value (see `written`), where there are kinds.
    """

    statement: str
    question: str
    answer: str
    line: bool = False
    kind: str = ""


def _thing(rng: random.Random, words: Words) -> str:
    """Something that can have an attribute: a person, place, project, device or object."""
    adjective, noun, word = rng.choice(ADJECTIVES), rng.choice(NOUNS), invented_word(rng).capitalize()
    if words and rng.random() < 0.4:
        one, two, three = (rng.choice(words) for _ in range(3))
        return rng.choice(
            (
                f"{one} {two}",
                f"the {one} {two}",
                f"{one.capitalize()} {two.capitalize()}",
                one.capitalize(),
                f"{one}-{two}",
                f"the {one} {two} {three}",
                f"{rng.choice(TITLES)} {one.capitalize()}",
                f"the {one.capitalize()} {two}",
                f"{rng.choice(TITLES)} {word} {two.capitalize()}",
                f"{one} {rng.choice('ABCDEFGHKXYZ')}",
                f"the {one} of {two.capitalize()}",
            )
        )
    return rng.choice(
        (
            f"{adjective}-{noun}",
            f"{adjective}-{noun}",
            f"the {adjective} {noun}",
            word,
            f"{word} {invented_word(rng).capitalize()}",
            f"Project {rng.choice((word, noun.capitalize(), adjective.capitalize()))}",
            f"{rng.choice(('station', 'server', 'room', 'unit', 'agent', 'sector', 'node'))} {word}",
            f"{adjective.capitalize()} {noun.capitalize()}",
            f"the {word} {noun}",
            f"{rng.choice(ADJECTIVES)} {adjective} {noun}",
        )
    )


def _number(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.choice((3, 4, 4, 5, 5, 5, 6, 6, 7, 7, 8))))


def _name(rng: random.Random, words: Words) -> str:
    word, other = invented_word(rng), invented_word(rng)
    if words and rng.random() < 0.6:
        one, two = rng.choice(words), rng.choice(words)
        return rng.choice(
            (
                one,
                one.capitalize(),
                f"{one.capitalize()} {two.capitalize()}",
                f"{one.capitalize()} {word.capitalize()}",
                f"{word.capitalize()} {two.capitalize()}",
                f"{one} {two}",
                word + one[:3],
            )
        )
    return rng.choice(
        (
            f"{word.capitalize()} {other.capitalize()}",
            f"{word.capitalize()} {other.capitalize()}",
            word.capitalize(),
            f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
            rng.choice(NOUNS),
            f"{rng.choice(NOUNS).capitalize()} {word.capitalize()}",
        )
    )


def _attribute(rng: random.Random, table: list[str], words: Words) -> str:
    if words and rng.random() < 0.2:
        return rng.choice(
            (
                rng.choice(words),
                f"{rng.choice(words)} {rng.choice(words)}",
                f"{rng.choice(words)} code",
                f"{rng.choice(words)} number",
            )
        )
    if rng.random() < 0.25:
        return f"{rng.choice(ADJECTIVES)} {rng.choice((*NOUNS, 'number', 'code', 'name'))}"
    return rng.choice(table)


def attribute_fact(
    rng: random.Random, attribute: str | None = None, thing: str | None = None, words: Words = ()
) -> Fact:
    """`The {attribute} of {thing} is {value}.` with a number or a name for value."""
    number = rng.random() < 0.65
    attribute = attribute or _attribute(rng, NUMBER_ATTRIBUTES if number else NAME_ATTRIBUTES, words)
    thing = thing or _thing(rng, words)
    value = _number(rng) if number else _name(rng, words)
    link = rng.choice(("of", "for"))
    statement = rng.choice(
        (
            f"The {attribute} {link} {thing} is {value}.",
            f"The {attribute} {link} {thing} is {value}.",
            f"The {attribute} {link} {thing} is {value}.",
            f"Remember: the {attribute} {link} {thing} is {value}.",
            f"Note that the {attribute} {link} {thing} is {value}.",
            f"The {attribute} {link} {thing}: {value}.",
        )
    )
    ask = "Who" if attribute in WHO and not number else "What"
    question = f"{ask} is the {attribute} {link} {thing}?"
    if rng.random() < 0.2 and not thing.startswith("the "):
        statement, question = f"{thing}'s {attribute} is {value}.", f"{ask} is {thing}'s {attribute}?"
    return Fact(statement, question, value)


def needle_fact(rng: random.Random, words: Words = ()) -> Fact:
    """A sentence in the style of needle-in-a-haystack tests."""
    key = rng.choice(
        (f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}", rng.choice(words or NOUNS), invented_word(rng))
    )
    value = _number(rng)
    return Fact(
        f"One of the special magic numbers for {key} is: {value}.",
        f"What is the special magic number for {key} mentioned in the provided text?",
        value,
    )


def code_fact(rng: random.Random, words: Words = ()) -> Fact:
    """A line of code, configuration or log that gives a named constant its value."""
    parts = [
        rng.choice(CODE_PARTS)
        if rng.random() < 0.5
        else rng.choice(words)
        if words and rng.random() < 0.6
        else invented_word(rng)
        for _ in range(rng.choice((2, 2, 3)))
    ]
    name = rng.choice(
        (
            "_".join(parts).upper(),
            "_".join(parts).upper(),
            "_".join(parts),
            parts[0] + "".join(p.capitalize() for p in parts[1:]),
            "-".join(parts),
            ".".join(parts),
        )
    )
    value = _number(rng)
    statement = rng.choice(
        (
            f"{name} = {value}",
            f"{name} = {value}",
            f"{name}: {value}",
            f"const {name} = {value};",
            f"#define {name} {value}",
            f'"{name}": {value},',
            f"{name}={value}",
            f"static final int {name} = {value};",
            f"let {name} = {value};",
            f"set {name} to {value}",
        )
    )
    return Fact(statement, f"What is the value of {name}?", value, line=True)


def random_fact(rng: random.Random, words: Words = ()) -> Fact:
    """One fact of any kind."""
    draw = rng.random()
    if draw < 0.62:
        return attribute_fact(rng, words=words)
    return code_fact(rng, words) if draw < 0.87 else needle_fact(rng, words)


def random_facts(rng: random.Random, count: int, words: Words = ()) -> list[Fact]:
    """Facts with distinct questions; in half of the calls many share an attribute or a thing, so that only
    the whole question tells them apart. `words` are real words to draw from beside the built-in lists."""
    alike = rng.random() < 0.5
    attributes = [_attribute(rng, NUMBER_ATTRIBUTES, words) for _ in range(2)]
    things = [_thing(rng, words) for _ in range(3)]
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        fact = random_fact(rng, words)
        if alike and rng.random() < 0.7:
            attribute, thing = rng.choice((*attributes, None)), rng.choice((*things, None, None))
            fact = attribute_fact(rng, attribute, thing, words)
        key = fact.question.lower().replace(" for ", " of ")
        if key not in facts:
            facts[key] = fact
    return list(facts.values())


def format_question(question: str) -> str:
    """What follows a document to ask a model without chat template; the model continues with the answer."""
    return f"\n\nQuestion: {question}\nAnswer:"
