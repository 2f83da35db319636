"""Facts made of real sentences: a value is put into a sentence in the place of what stood there, and a
question asks for it with some of the words around it.

Real sentences bring what made-up ones lack: clauses behind the value, words in any order, and wordings that
nobody has thought of.
"""

import random
import re

from .conversations import Texts, split_sentences
from .facts import Fact
from .forms import FORMS
from .phrases import openings
from .values import listed
from .words import ADJECTIVES, NOUNS

_BEFORE_VALUES = frozenset(
    listed(
        "is|was|are|were|be|been|at|on|by|for|from|to|of|with|had|has|have|as|than|about|under|until|since|"
        "costs|takes|called|within|after|before"
    )
)
_SMALL = frozenset(
    listed(
        "the|a|an|of|to|in|on|at|by|for|from|with|and|or|but|that|this|it|is|was|are|were|be|been|as|if|its|"
        "his|her|their|our|your|my|not|so|than|then|there|which|who|whom|what|when|where|how|why|did|does|do|"
        "can|may|will|shall|would|should|could|might|must|had|has|have|during"
    )
)
_AUXILIARY = ("is", "was", "are", "were", "does", "did", "has", "had", "can", "will", "")
# Words with which questions ask, and which no statement need share.
_ASKING = frozenset(
    listed(
        "long|much|many|code|number|address|date|time|version|release|level|rate|sum|price|share|found|far|"
        "mentioned|provided|text|special|magic|value|given|give|register|until|since|under|before|after|"
        "within|near|more|least|often|quickly|soon|day"
    )
)
_TRIES = 20


def _content(words: list[str]) -> list[str]:
    return [w for w in words if len(w) > 3 and w.strip(".,;:!?").lower() not in _SMALL]


def _changed(rng: random.Random, word: str) -> str:
    """The word in another form, as a question may have it: `walked`, `walks` as `walk`."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) > 3 and rng.random() < 0.4:
            return word.removesuffix(ending)
    return word


def borrowed_fact(rng: random.Random, texts: Texts, kind: str | None = None) -> Fact | None:
    """A sentence of `texts` with a value in it, and its question; None if none near a random place fits.

    Args:
        kind: kind of value, of `written.WRITTEN_KINDS`; drawn if not given.
    """
    kind = kind or rng.choice(tuple(FORMS))
    found = [s.split() for s in split_sentences(texts.draw(rng, 1500))]
    fitting = [words for words in found if 8 <= len(words) <= 28 and not re.search(r"\d", " ".join(words))]
    rng.shuffle(fitting)
    for words in fitting:
        places = [
            i + 1
            for i, word in enumerate(words[:-1])
            if word.lower() in _BEFORE_VALUES and len(_content(words[max(0, i - 8) : i + 1])) >= 2
        ]
        if places:
            return _with_value(rng, words, rng.choice(places), kind)
    return None


def _with_value(rng: random.Random, words: list[str], place: int, kind: str) -> Fact:
    value = rng.choice(FORMS[kind]).make(rng)
    behind = place
    for _ in range(rng.randrange(1, 4)):  # what the value takes the place of, up to the end of a clause
        if behind < len(words) and (behind == place or words[behind - 1][-1].isalnum()):
            behind += 1
    end = re.search(r"[.,;:!?)\"']*$", words[behind - 1])
    mark = end.group() if end else ""
    rest = words[behind:]
    mark = mark or ("." if not rest else "")
    statement = " ".join([*words[:place], value + mark, *rest]).replace("..", ".")
    before = words[max(0, place - rng.randrange(5, 10)) : place]
    after = rest[: rng.randrange(1, 6)] if rng.random() < 0.5 and not mark else []
    kept = [w.strip(".,;:!?()\"'") for w in (*before, *after)]
    asked = [w for w in kept if w and (w.lower() not in _SMALL or rng.random() < 0.7)]
    if before == words[:place] and asked[0] != "I":
        asked[0] = asked[0][:1].lower() + asked[0][1:]
    asked = [_changed(rng, w) for w in asked]
    question = " ".join(w for w in (rng.choice(openings(kind)), rng.choice(_AUXILIARY), *asked) if w)
    return Fact(statement, f"{question}?", value, kind=kind)


def near_miss(rng: random.Random, question: str, words: list[str]) -> str | None:
    """The question with one word that tells what it is about replaced by another, so that what answered it
    no longer does; None if it has no such word.

    `MAX_RETRY_COUNT` and `blue-falcon` are changed in one of their parts.
    """
    spots = [
        m
        for m in re.finditer(r"[A-Za-z]{3,}", question)
        if m.start() and m.group().lower() not in _ASKING | _SMALL
    ]
    if not spots:
        return None
    spot = rng.choice(spots)
    old = spot.group()
    for _ in range(_TRIES):
        new = rng.choice(words if words and rng.random() < 0.4 else rng.choice((ADJECTIVES, NOUNS)))
        if new[:4] == old.lower()[:4]:
            continue
        new = new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new
        return f"{question[: spot.start()]}{new}{question[spot.end() :]}"
    return None
