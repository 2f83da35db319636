"""Facts in sentences put together from parts: a subject, a verb in some tense, a value with its preposition.

The forms of `forms` are a few hundred wordings, and a model that has seen a few hundred takes a wording it
has not seen for an absent fact. Here subjects, verbs, tenses, openings and endings are drawn each on its own,
so that no wording is seen often and only the words that question and statement share tell a fact that is
there from one that is not. Sense is not asked for: a chapel may be delivered at 10:15.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .facts import Fact
from .forms import FORMS
from .values import listed, person, town
from .words import ADJECTIVES, NOUNS, invented_word

Words = Sequence[str]

# Base forms that take -s and -ed by rule.
_REGULAR = listed(
    "deliver|repair|inspect|paint|load|collect|return|record|mention|install|clean|check|move|store|"
    "transfer|register|announce|publish|discover|examine|lease|insure|protect|display|measure|present|"
    "order|adjust|connect|restore|arrange|count|supply|produce|test|finish|reach|carry|empty|need|"
    "consume|generate|serve|visit|support|replace|receive|change|divide|cover|review|sign|treat|"
    "water|warm|cool|press|mark|label|number|name|list|print|copy|share|rename|expect|demand|offer|"
    "charge|value|assess|tax|earn|gain|save|waste|owe|promise|retain|hire|train|appoint|invite|"
    "guard|lock|fasten|raise|lower|turn|pull|push|mount|attach|remove|recover|trace|locate|address|"
    "assign|allocate|reserve|cancel|renew|extend|suspend|delay|complete|start|open|close|"
    "pass|cross|enter|dock|anchor|land|arrive|depart|wait|stay|last|remain|continue|operate|work|"
    "rotate|vibrate|resist|absorb|emit|contain|include|require|use|host|answer|call|report|explain"
)
_IRREGULAR = [
    tuple(entry.split())
    for entry in listed(
        "keep keeps kept kept|hold holds held held|send sends sent sent|find finds found found|"
        "leave leaves left left|bring brings brought brought|buy buys bought bought|sell sells sold sold|"
        "build builds built built|lend lends lent lent|pay pays paid paid|begin begins began begun|"
        "write writes wrote written|draw draws drew drawn|give gives gave given|take takes took taken|"
        "drive drives drove driven|lay lays laid laid|lead leads led led|lose loses lost lost|"
        "read reads read read|set sets set set|win wins won won|teach teaches taught taught|"
        "hide hides hid hidden|spend spends spent spent|run runs ran run|meet meets met met|"
        "stand stands stood stood|sink sinks sank sunk|break breaks broke broken|"
        "choose chooses chose chosen|wear wears wore worn|grow grows grew grown|"
        "throw throws threw thrown|feed feeds fed fed|hang hangs hung hung|light lights lit lit|"
        "get gets got got|lie lies lay lain|fly flies flew flown|ride rides rode ridden|"
        "shut shuts shut shut|cut cuts cut cut|put puts put put|know knows knew known|"
        "freeze freezes froze frozen|steal steals stole stolen|wake wakes woke woken"
    )
]


def _regular(base: str) -> tuple[str, str, str, str]:
    if base.endswith("y") and base[-2] not in "aeiou":
        return base, f"{base[:-1]}ies", f"{base[:-1]}ied", f"{base[:-1]}ied"
    third = f"{base}es" if base.endswith(("s", "sh", "ch", "x")) else f"{base}s"
    past = f"{base}d" if base.endswith("e") else f"{base}ed"
    return base, third, past, past


VERBS: tuple[tuple[str, ...], ...] = (*map(_regular, _REGULAR), *_IRREGULAR)

# By kind of value: what stands around it, and how a question may begin.
_SLOTS: dict[str, str] = {
    "number": "{v} {n}=How many {n}|{v}=What number;How many;How much|over {v} {n}=How many {n}|number {v}="
    "Which number|as many as {v} {n}=How many {n}",
    "price": "for {v}=For how much;How much;At what price|at {v}=At what price;How much|{v}=How much;What;"
    "What sum|up to {v}=How much;Up to what sum|{v} a day=How much|{v} for each {o}=How much",
    "date": "on {v}=When;On what date;On which day;What day|since {v}=Since when;Since what date|"
    "until {v}=Until when;Until what date|before {v}=Before what date;By when|from {v}=From when;When",
    "time": "at {v}=When;At what time;What time|from {v}=From what time;From when|until {v}=Until what time;"
    "Until when|before {v}=Before what time|after {v}=After what time;When",
    "duration": "for {v}=How long;For how long|within {v}=Within what time;How soon|after {v}=After how long;"
    "When|{v}=How long;How much time|every {v}=How often|in {v}=How quickly;In what time",
    "measure": "{v}=How much;What;How far|up to {v}=How much;Up to what;How far|"
    "at {v}=At what;At which level|more than {v}=How much;More than what|"
    "by {v}=By how much|at least {v}=How much;What at least",
    "percentage": "{v}=How much;What share|by {v}=By how much|{v} of the {n}=What share of the {n};"
    "How much of the {n}|at {v}=At what rate;At what",
    "version": "version {v}=Which version;What version|release {v}=Which release|{v}=What;Which release|"
    "version {v} of the {o}=Which version of the {o};What version of the {o}|to version {v}=To which version|"
    "with {o} {v}=With which {o};What {o}",
    "address": "at {v}=Where;At what address;At which address|to {v}=Where;To which address;To what address|"
    "from {v}=From where;From what address|near {v}=Near what;Where",
    "network": "at {v}=Where;At which address;At what address|on {v}=Where;On which address|to {v}=Where;"
    "To which address;To what|from {v}=From where;From which address|via {v}=Via what;How",
    "code": "under {v}=Under which number;Under what code;Under what|with {v}=With which code;With what|"
    "as {v}=As what;How|by code {v}=By which code|number {v}=Which number|{v}=What;Which code|"
    "with the {o} {v}=With which {o};With what {o}",
    "phone": "on {v}=On which number;On what number|at {v}=At which number;Where|"
    "under {v}=Under which number",
    "person": "with {v}=With whom|to {v}=To whom;Whom|from {v}=From whom|{v}=Whom;Who|for {v}=For whom",
}
_LEADS = listed(
    "On Sundays|In spring|Last year|As a rule|In the end|During the war|According to the report|"
    "Since the fire|At first|For now|Most of the time|In the autumn|After some debate|So far as is known|"
    "By order of the board|In an ordinary year|Two years ago|From time to time|Under the new rules|"
    "To everyone's surprise|On the second try|As the minutes show|Before the flood|In summer|Once a year"
)
_ENDS = listed(
    "and is full by noon|who grew up in {t}|, which nobody expected|in the {a} {o}|to a {o}|on Mondays|"
    "and not a moment sooner|, as agreed|for the {o}|during the {o}|with the {a} {o}|near {t}|"
    "because of the {o}|and the {o} followed|, the {o} of {t} wrote|, but the {o} was {d}|"
    "when the {o} is {d}|at the request of {t}|instead of a {o}|and so was the {o}|"
    "after the {o}|, it is said|, according to {t}|"
    "this year|at any season|in those days|before anyone could {b}|that {t} had {d}|without a {o}|"
    "and {d} the {o}|if the {o} allows it"
)
_PLACES = listed("in|by|near|behind|under|above|beside|around|beyond|inside|on|opposite|across from")
_FOR = listed("for|about|from|against|of|without|before|after|between|with")
_TAKERS = listed("The records say that|We learnt that|Note that|It seems that|Remember that|It is known that")
_PRESENT, _PAST, _PERFECT, _MODAL = "present", "past", "perfect", "modal"
_MODALS = listed("can|may|should|will|would|could|must|shall|might")
_MODAL_SHARES = {_PRESENT: 3, _PAST: 3, _PERFECT: 1, _MODAL: 2}


def openings(kind: str) -> tuple[str, ...]:
    """How a question that asks for a value of this kind may begin, for sentences of any make."""
    found = ";".join(slot.partition("=")[2] for slot in listed(_SLOTS[kind])).split(";")
    return tuple(opening for opening in found if "{" not in opening)


def with_articles(text: str) -> str:
    """`a` before a vowel as `an`."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def plural(noun: str) -> str:
    """The plural of a noun, by rule."""
    if noun.endswith("f") and noun[:-1] in ("lea", "shel", "wol"):
        return f"{noun[:-1]}ves"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "sh", "ch", "x")) else f"{noun}s"


def _noun(rng: random.Random, words: Words) -> str:
    return rng.choice(words) if words and rng.random() < 0.5 else rng.choice(NOUNS)


def _adjective(rng: random.Random, words: Words) -> str:
    return rng.choice(words) if words and rng.random() < 0.3 else rng.choice(ADJECTIVES)


@dataclass(frozen=True)
class _Subject:
    """Who or what a sentence is about, and whether it is many."""

    text: str
    many: bool = False


def _subject(rng: random.Random, words: Words) -> _Subject:
    noun, other, adjective = _noun(rng, words), _noun(rng, words), _adjective(rng, words)
    place, name = rng.choice(_PLACES), invented_word(rng).capitalize()
    if rng.random() < 0.3:
        many = rng.choice(
            (
                f"{plural(noun)} {rng.choice(_FOR)} the {other}",
                f"{plural(noun)} {rng.choice(_FOR)} {other}",
                f"{adjective} {plural(noun)}",
                f"the {plural(noun)} {place} the {other}",
                f"all {plural(noun)} of the {adjective} {other}",
                f"{adjective} {plural(noun)} {place} the {other} side",
                f"the {plural(noun)} of {town(rng)}",
                f"our {plural(noun)}",
            )
        )
        return _Subject(many, many=True)
    return _Subject(
        rng.choice(
            (
                f"the {noun}",
                f"the {adjective} {noun}",
                f"the {adjective} {noun}",
                f"the {noun} {place} the {other}",
                f"the {noun} of the {plural(other)}",
                f"the {adjective} {noun} of {town(rng)}",
                f"the {noun} from {town(rng)} to {name}",
                f"a {adjective} {noun} to {town(rng)}",
                f"each {noun} of the {other}",
                f"every {noun} {place} the {adjective} {other}",
                f"our {noun}",
                f"your {noun}",
                f"the {adjective} {noun} of the {other}",
                f"the {other} {noun}",
                f"the {noun} {name}",
                f"{adjective} {noun} from the {other}",
                f"{town(rng)}'s {noun}",
                f"{name} {noun.capitalize()}",
                person(rng),
                f"the {noun} of {name}",
            )
        )
    )


def _sentence(said: str, value: str) -> str:
    """A sentence of it, with its articles right and the value as it is."""
    before, _, after = f"{said[:1].upper()}{said[1:]}.".replace("..", ".").partition(value)
    return f"{with_articles(before)}{value}{with_articles(after)}"


def _end(rng: random.Random, words: Words) -> str:
    """How a sentence goes on behind its value."""
    end = rng.choice(_ENDS).format(
        t=town(rng),
        a=_adjective(rng, words),
        o=_noun(rng, words),
        d=rng.choice(VERBS)[3],
        b=rng.choice(VERBS)[0],
    )
    return end if end.startswith(",") else f" {end}"


@dataclass(frozen=True)
class _Clause:
    """What a sentence says and its question asks for, without the value."""

    kind: str
    subject: _Subject
    verb: tuple[str, ...]
    tense: str
    modal: str
    passive: bool
    taken: str  # the object, behind an active verb
    around: str  # what stands around the value
    opening: str  # how the question begins

    @property
    def key(self) -> str:
        """Facts of one key would answer each other's questions."""
        return f"{self.subject.text} {self.verb[0]}"

    def _verb(self) -> tuple[str, str, str]:
        """The finite verb as a sentence has it; what comes before the subject in a question, and behind."""
        base, third, past, participle = self.verb
        many = self.subject.many
        if self.tense == _PERFECT:
            has, rest = ("have" if many else "has"), f"been {participle}" if self.passive else participle
            return f"{has} {rest}", has, rest
        if self.tense == _MODAL:
            rest = f"be {participle}" if self.passive else base
            return f"{self.modal} {rest}", self.modal, rest
        if self.passive:
            be = ("were" if many else "was") if self.tense == _PAST else ("are" if many else "is")
            return f"{be} {participle}", be, participle
        if self.tense == _PAST:
            return past, "did", base
        return (base, "do", base) if many else (third, "does", base)

    def statement(self, rng: random.Random, value: str, words: Words) -> str:
        said = f"{self.subject.text} {self._verb()[0]}"
        said += f" {self.taken}" if self.taken else ""
        said += f" {self.around.replace('{v}', value)}"
        draw = rng.random()
        if draw < 0.2:
            said = f"{rng.choice(_LEADS)}{rng.choice(('', ','))} {said}"
        elif draw < 0.3:
            said = f"{rng.choice(_TAKERS)} {said}"
        if rng.random() < 0.4:
            said += _end(rng, words)
        return _sentence(said, value)

    def question(self, rng: random.Random) -> str:
        _, before, behind = self._verb()
        subject = self.subject.text
        for owner in ("our ", "your ", "a ", "each ", "every ", "all "):
            if subject.startswith(owner) and rng.random() < 0.5:
                subject = f"the {subject.removeprefix(owner)}"
        asked = f"{self.opening} {before} {subject} {behind}"
        return f"{asked} {self.taken}?" if self.taken else f"{asked}?"


def _clause(rng: random.Random, kind: str, words: Words) -> _Clause:
    around, _, openings = rng.choice(listed(_SLOTS[kind])).partition("=")
    filling = {"{n}": plural(_noun(rng, words)), "{o}": _noun(rng, words)}
    opening = rng.choice(openings.split(";"))
    for mark, word in filling.items():
        around, opening = around.replace(mark, word), opening.replace(mark, word)
    passive = rng.random() < 0.5
    taken = "" if passive or rng.random() < 0.6 else f"{rng.choice(('the', 'a', 'its'))} {_noun(rng, words)}"
    tense = rng.choices(list(_MODAL_SHARES), list(_MODAL_SHARES.values()))[0]
    return _Clause(
        kind,
        _subject(rng, words),
        rng.choice(VERBS),
        tense,
        rng.choice(_MODALS),
        passive,
        taken,
        around,
        opening,
    )


def _agent(rng: random.Random, words: Words) -> tuple[str, Fact]:
    """Somebody who does something: the value is who. Returned with its key, as `_Clause.key`."""
    subject, verb, who = _subject(rng, words), rng.choice(VERBS), person(rng)
    be = rng.choice(("was", "is")) if not subject.many else rng.choice(("were", "are"))
    active = verb[2] if be in ("was", "were") else verb[1]
    end = _end(rng, words) if rng.random() < 0.4 else ""
    said = rng.choice((f"{subject.text} {be} {verb[3]} by {who}{end}", f"{who} {active} {subject.text}{end}"))
    asked = rng.choice((f"Who {active} {subject.text}?", f"By whom {be} {subject.text} {verb[3]}?"))
    statement = _sentence(said, who)
    return f"{subject.text} {verb[0]}", Fact(statement, with_articles(asked), who, kind="person")


def phrased_facts(rng: random.Random, count: int, words: Words = ()) -> list[Fact]:
    """`count` facts that do not answer each other's questions; `words` are real words to draw from.

    Every third one or so shares the subject or the verb with another, so that only the whole question tells
    them apart.
    """
    facts: dict[str, Fact] = {}
    clauses: list[_Clause] = []
    while len(facts) < count:
        if rng.random() < 0.06:
            key, fact = _agent(rng, words)
            facts.setdefault(key, fact)
            continue
        clause = _clause(rng, rng.choice(tuple(FORMS)), words)
        if clauses and rng.random() < 0.35:
            other = rng.choice(clauses)
            shared = {"subject": other.subject} if rng.random() < 0.5 else {"verb": other.verb}
            clause = replace(clause, **shared)
        if clause.key in facts:
            continue
        clauses.append(clause)
        value = rng.choice(FORMS[clause.kind]).make(rng)
        statement, question = clause.statement(rng, value, words), clause.question(rng)
        facts[clause.key] = Fact(statement, with_articles(question), value, kind=clause.kind)
    return list(facts.values())
