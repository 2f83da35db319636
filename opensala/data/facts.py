"""Facts to hide in a document, the questions that ask for them, and the answers: the one generator that
training, demonstrations, probes and evaluations share.

A fact is one sentence or one line of code: an attribute of something has a value. The question repeats the
words of the fact. Names, attributes and values are drawn so widely that they cannot be known beforehand.
It knows nothing of tokens or documents.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

_ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "ia", "io", "oa", "ou"]
_CODAS = ["", "", "n", "r", "l", "s", "x", "m", "nd", "rk", "st", "th", "ck"]
_ADJECTIVES = [
    "amber",
    "ancient",
    "blue",
    "bold",
    "brave",
    "bright",
    "broken",
    "calm",
    "clever",
    "cold",
    "copper",
    "crimson",
    "curious",
    "dark",
    "deep",
    "distant",
    "dry",
    "eager",
    "early",
    "empty",
    "fancy",
    "fast",
    "final",
    "gentle",
    "giant",
    "golden",
    "grand",
    "gray",
    "green",
    "happy",
    "hidden",
    "hollow",
    "honest",
    "humble",
    "icy",
    "inner",
    "iron",
    "jolly",
    "keen",
    "large",
    "late",
    "lazy",
    "little",
    "lonely",
    "long",
    "lost",
    "loud",
    "lucky",
    "magic",
    "mellow",
    "mighty",
    "misty",
    "narrow",
    "new",
    "noble",
    "northern",
    "odd",
    "old",
    "olive",
    "orange",
    "outer",
    "pale",
    "patient",
    "plain",
    "polite",
    "proud",
    "purple",
    "quick",
    "quiet",
    "rapid",
    "rare",
    "red",
    "rough",
    "royal",
    "rusty",
    "secret",
    "shiny",
    "short",
    "silent",
    "silver",
    "simple",
    "slow",
    "small",
    "smooth",
    "soft",
    "southern",
    "spare",
    "stale",
    "steady",
    "still",
    "strange",
    "strong",
    "sunny",
    "sweet",
    "swift",
    "tall",
    "tame",
    "tiny",
    "upper",
    "vivid",
    "warm",
    "weary",
    "western",
    "white",
    "wide",
    "wild",
    "winter",
    "wise",
    "wooden",
    "young",
]
_NOUNS = [
    "anchor",
    "apple",
    "arrow",
    "badger",
    "barrel",
    "basin",
    "beacon",
    "bell",
    "bird",
    "boat",
    "book",
    "bottle",
    "branch",
    "bridge",
    "brook",
    "bucket",
    "cabin",
    "camel",
    "candle",
    "canyon",
    "castle",
    "cellar",
    "chair",
    "circle",
    "cliff",
    "clock",
    "cloud",
    "coin",
    "comet",
    "corner",
    "cottage",
    "crane",
    "creek",
    "crown",
    "desert",
    "dolphin",
    "door",
    "dragon",
    "eagle",
    "engine",
    "falcon",
    "farm",
    "feather",
    "fern",
    "field",
    "finch",
    "fire",
    "forest",
    "fountain",
    "fox",
    "garden",
    "gate",
    "glacier",
    "grove",
    "hammer",
    "harbor",
    "hawk",
    "hill",
    "horse",
    "house",
    "island",
    "jacket",
    "jungle",
    "kettle",
    "key",
    "kite",
    "ladder",
    "lake",
    "lamp",
    "lantern",
    "leaf",
    "library",
    "lion",
    "maple",
    "market",
    "meadow",
    "mill",
    "mirror",
    "monkey",
    "moon",
    "mountain",
    "needle",
    "oak",
    "ocean",
    "otter",
    "owl",
    "palace",
    "panda",
    "paper",
    "pearl",
    "pencil",
    "phoenix",
    "piano",
    "pine",
    "planet",
    "pond",
    "portal",
    "rabbit",
    "rain",
    "raven",
    "ridge",
    "river",
    "road",
    "rocket",
    "root",
    "rose",
    "saddle",
    "sail",
    "school",
    "shadow",
    "shell",
    "ship",
    "shore",
    "signal",
    "sky",
    "snow",
    "spider",
    "spring",
    "star",
    "station",
    "stone",
    "storm",
    "stream",
    "summit",
    "sun",
    "table",
    "temple",
    "thunder",
    "tiger",
    "tower",
    "train",
    "tree",
    "tunnel",
    "valley",
    "violet",
    "wagon",
    "wall",
    "water",
    "wave",
    "whale",
    "wheel",
    "willow",
    "wind",
    "window",
    "wolf",
]
_NUMBER_ATTRIBUTES = [
    "access code",
    "account number",
    "badge number",
    "batch number",
    "budget",
    "case number",
    "catalog number",
    "code",
    "combination",
    "confirmation number",
    "contract number",
    "control number",
    "customer number",
    "door code",
    "employee number",
    "entry code",
    "file number",
    "flight number",
    "gate code",
    "id",
    "invoice number",
    "job number",
    "key",
    "key code",
    "license number",
    "locker number",
    "lot number",
    "lucky number",
    "magic number",
    "member number",
    "order number",
    "page number",
    "part number",
    "passcode",
    "password",
    "phone number",
    "pin",
    "population",
    "port",
    "postal code",
    "price",
    "product number",
    "protocol number",
    "quota",
    "reference number",
    "registration number",
    "release number",
    "room number",
    "routing number",
    "secret code",
    "secret number",
    "security code",
    "serial number",
    "service number",
    "ticket number",
    "timeout",
    "tracking number",
    "unlock code",
    "vault code",
    "verification code",
    "version number",
    "weight",
]
_NAME_ATTRIBUTES = [
    "author",
    "captain",
    "chief engineer",
    "city",
    "codename",
    "color",
    "coordinator",
    "director",
    "editor",
    "favorite animal",
    "founder",
    "guardian",
    "home town",
    "inspector",
    "keeper",
    "language",
    "leader",
    "location",
    "manager",
    "mascot",
    "mayor",
    "meeting place",
    "middle name",
    "mother",
    "name",
    "nickname",
    "owner",
    "partner",
    "password",
    "pilot",
    "president",
    "project lead",
    "secret word",
    "sponsor",
    "supervisor",
    "supplier",
    "teacher",
    "tutor",
    "winner",
]
_CODE_PARTS = [
    "max",
    "min",
    "default",
    "base",
    "cache",
    "retry",
    "limit",
    "size",
    "count",
    "timeout",
    "buffer",
    "thread",
    "worker",
    "queue",
    "session",
    "token",
    "user",
    "page",
    "block",
    "chunk",
    "window",
    "batch",
    "rate",
    "port",
    "offset",
    "width",
    "height",
    "depth",
    "level",
    "index",
    "seed",
    "version",
    "flag",
    "mode",
    "state",
    "error",
    "status",
    "memory",
    "disk",
    "node",
    "cluster",
    "shard",
    "replica",
    "stream",
    "socket",
    "client",
    "server",
    "request",
    "response",
    "upload",
    "download",
    "backup",
    "archive",
    "report",
    "invoice",
    "order",
    "price",
    "tax",
    "discount",
    "alpha",
    "beta",
    "gamma",
    "delta",
    "sigma",
    "omega",
    "north",
    "south",
    "east",
    "west",
    "primary",
    "secondary",
    "internal",
    "external",
    "legacy",
]
_TITLES = (
    "Dr.",
    "Captain",
    "Professor",
    "Mr.",
    "Mrs.",
    "Agent",
    "Lady",
    "Sir",
    "Operation",
    "Camp",
    "Port",
    "Mount",
    "Team",
    "Lake",
    "Fort",
    "Building",
    "Model",
    "Class",
)
_WHO = {
    "author",
    "captain",
    "chief engineer",
    "coordinator",
    "director",
    "editor",
    "founder",
    "guardian",
    "inspector",
    "keeper",
    "leader",
    "manager",
    "mayor",
    "mother",
    "owner",
    "partner",
    "pilot",
    "president",
    "project lead",
    "sponsor",
    "supervisor",
    "supplier",
    "teacher",
    "tutor",
    "winner",
}


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


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of two or three syllables that means nothing."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def compound(rng: random.Random) -> str:
    """An adjective and a noun, as keys are written: `amber-falcon`."""
    return f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"


def plain_words() -> list[str]:
    """All adjectives and nouns the facts are made of."""
    return sorted({*_ADJECTIVES, *_NOUNS})


def _thing(rng: random.Random, words: Words) -> str:
    """Something that can have an attribute: a person, place, project, device or object."""
    adjective, noun, word = rng.choice(_ADJECTIVES), rng.choice(_NOUNS), invented_word(rng).capitalize()
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
                f"{rng.choice(_TITLES)} {one.capitalize()}",
                f"the {one.capitalize()} {two}",
                f"{rng.choice(_TITLES)} {word} {two.capitalize()}",
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
            f"{rng.choice(_ADJECTIVES)} {adjective} {noun}",
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
            f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}",
            rng.choice(_NOUNS),
            f"{rng.choice(_NOUNS).capitalize()} {word.capitalize()}",
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
        return f"{rng.choice(_ADJECTIVES)} {rng.choice((*_NOUNS, 'number', 'code', 'name'))}"
    return rng.choice(table)


def attribute_fact(
    rng: random.Random, attribute: str | None = None, thing: str | None = None, words: Words = ()
) -> Fact:
    """`The {attribute} of {thing} is {value}.` with a number or a name for value."""
    number = rng.random() < 0.65
    attribute = attribute or _attribute(rng, _NUMBER_ATTRIBUTES if number else _NAME_ATTRIBUTES, words)
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
    ask = "Who" if attribute in _WHO and not number else "What"
    question = f"{ask} is the {attribute} {link} {thing}?"
    if rng.random() < 0.2 and not thing.startswith("the "):
        statement, question = f"{thing}'s {attribute} is {value}.", f"{ask} is {thing}'s {attribute}?"
    return Fact(statement, question, value)


def needle_fact(rng: random.Random, words: Words = ()) -> Fact:
    """A sentence in the style of needle-in-a-haystack tests."""
    key = rng.choice(
        (f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}", rng.choice(words or _NOUNS), invented_word(rng))
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
        rng.choice(_CODE_PARTS)
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
    attributes = [_attribute(rng, _NUMBER_ATTRIBUTES, words) for _ in range(2)]
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
