"""Retrieval tasks as token sequences: facts hidden in a haystack, then questions and answers."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .borrowed import borrowed_fact, near_miss
from .conversations import Texts, insert
from .facts import Fact, format_question, random_facts
from .haystack import Haystack
from .phrases import phrased_facts
from .written import ABSENT, revalued, written_facts


@dataclass(frozen=True)
class Sequence:
    """Training tokens `[T]`, with a mark on those that are answers (and the end-of-text after each), and the
    questions' facts in the order of the answers."""

    ids: np.ndarray
    answer: np.ndarray
    asked: tuple[Fact, ...] = ()


def place(rng: random.Random, fact: Fact) -> str:
    """A statement with the white space that separates it from the text around it."""
    if fact.line:
        indent = " " * rng.choice((0, 0, 0, 4, 8))
        # Some lines after it begin with digits, so that the end of a value is learnt from the line's end.
        return f"\n{indent}{fact.statement}\n" + (str(rng.randrange(10**5)) if rng.random() < 0.4 else "")
    return rng.choice(
        (
            f" {fact.statement} ",
            f"\n{fact.statement}\n",
            f"\n\n{fact.statement}\n\n",
            f" {fact.statement}\n",
            f"\n# {fact.statement}\n",
            f"\n    # {fact.statement}\n",
            f"\n// {fact.statement}\n",
            f"\n- {fact.statement}\n",
            f"\n{fact.statement}\n{rng.randrange(10**4)}",
        )
    )


def _decoy(rng: random.Random, fact: Fact, words: list[str]) -> str:
    """Text that begins like the fact's value and continues differently: only the whole fact, not the value's
    own beginning, may tell how a copied value continues and where it ends."""
    kept = fact.answer[: rng.randrange(1, len(fact.answer) + 1)]
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randrange(1, 5)))
    tail = digits if kept[-1].isdigit() else rng.choice(words)
    return rng.choice(
        (" {}{} ", "\n{}{}\n", " {}{}.", " = {}{}\n", ": {}{},", " is {}{}.\n", "\n{}{}")
    ).format(kept, tail)


def hide(
    tokenizer: Any, rng: random.Random, hay: np.ndarray, statements: list[str], between: float = 0.0
) -> np.ndarray:
    """Put statements into a token haystack at random places, the share `between` of them behind a sentence or
    a line: there the next word is none that a value could go on with."""
    cuts = [rng.randrange(len(hay) + 1) for _ in statements]
    if between and len(hay):
        kinds = {int(i) for i in np.unique(hay)}
        ends = [i for i in kinds if tokenizer.decode([i]).rstrip(" ").endswith((".", "\n", "?", "!"))]
        places = np.flatnonzero(np.isin(hay, ends)) + 1
        if len(places):
            cuts = [int(rng.choice(places)) if rng.random() < between else cut for cut in cuts]
    cuts.sort()
    if between:
        # As in a document: what follows brings the white space between the two.
        spaced = [cut < len(hay) and tokenizer.decode([hay[cut]])[:1].isspace() for cut in cuts]
        statements = [s.rstrip(" ") if follows else s for s, follows in zip(statements, spaced, strict=True)]
    encoded = tokenizer(statements, add_special_tokens=False)["input_ids"] if statements else []
    parts, last = [], 0
    for cut, ids in zip(cuts, encoded, strict=True):
        parts += [hay[last:cut], np.array(ids, dtype=np.int32)]
        last = cut
    return np.concatenate([*parts, hay[last:]])


_LINES = 0.3  # of texts with each statement on a line of its own


def hide_in_prose(
    tokenizer: Any, rng: random.Random, texts: Texts, length: int, statements: list[str]
) -> np.ndarray:
    """Exactly `length` tokens of running text with statements as sentences or lines of their own in it.

    All of it is tokenized as one text, as a user's document is: behind a statement's full stop the next
    sentence then begins with the token that it begins with there. (Statements put between tokens bring
    white space of their own, so that `1250.` followed by ` The` was never seen, and values did not end.)

    Raises ValueError if the statements need more.
    """
    characters, put = int(2.6 * length), _on_lines if rng.random() < _LINES else insert
    while True:
        body = put(rng, texts.draw(rng, characters), statements) if characters else "\n".join(statements)
        ids = tokenizer(body, add_special_tokens=False)["input_ids"]
        if len(ids) <= length:
            break
        if not characters:
            raise ValueError(f"the statements need {len(ids)} tokens, {length} are there")
        # Shorter by what is too much, and a little more; few characters are left out altogether.
        characters = int(characters * max(0.2, 0.97 - (len(ids) - length) / len(ids)))
        characters = characters if characters > 40 else 0
    missing = length - len(ids)
    if not missing:
        return np.array(ids, dtype=np.int32)
    # What is missing comes before, cut in its first sentence as documents are that are read in parts.
    before = f"{texts.draw(rng, 8 * missing + 200)}\n\n"
    filled = tokenizer(before, add_special_tokens=False)["input_ids"][-missing:]
    return np.array([*filled, *ids], dtype=np.int32)[-length:]


def _on_lines(rng: random.Random, text: str, statements: list[str]) -> str:
    """Put statements into a text, each on a line of its own at a random depth, as in code and logs."""
    lines = text.split("\n")
    for cut, statement in sorted(((rng.randrange(len(lines) + 1), s) for s in statements), reverse=True):
        lines.insert(cut, statement)
    return "\n".join(lines)


def mixed_facts(
    rng: random.Random,
    count: int,
    words: list[str],
    written: float = 0.0,
    absent: float = 0.0,
    texts: Texts | None = None,
) -> tuple[list[Fact], list[Fact]]:
    """`count` facts to hide, and questions without a fact (answer ABSENT).

    Args:
        written: chance of each fact to have a value as people write it (`written`), instead of a number or a
            name.
        absent: questions without a fact for each fact, on average.
        texts: real texts whose sentences some facts are made of (`borrowed`).

    Facts with such values are worded as in `facts` (`revalued`), in `forms`, in `phrases` and, with `texts`,
    as real sentences are. Six of ten unanswerable questions are a stated fact's but for one word, the others
    are about anything.
    """
    prose = sum(rng.random() < written for _ in range(count)) if written else 0
    missing = sum(rng.random() < absent for _ in range(count)) if absent else 0
    if not prose and not missing:
        return random_facts(rng, count, words), []
    # How many of each wording: a draw for each fact, as small counts do not divide.
    wordings = rng.choices(_WORDINGS, _WORDING_SHARES, k=prose)
    copied, formed = wordings.count("revalued"), wordings.count("forms")
    nearly = sum(rng.random() < 0.6 for _ in range(missing))
    far = Counter(rng.choices(("plain", "forms", "phrases", "borrowed"), k=missing - nearly))
    withheld = far["plain"]
    made = written_facts(rng, formed, far["forms"], words)
    drawn = random_facts(rng, count - prose + copied + withheld, words)
    rng.shuffle(drawn)
    kept, held_back = drawn[withheld:], drawn[:withheld]
    kept = [*(revalued(rng, fact) for fact in kept[:copied]), *kept[copied:]]
    phrased = phrased_facts(rng, wordings.count("phrases") + far["phrases"], words)
    held_back += phrased[: far["phrases"]]
    lent = _borrowed(rng, wordings.count("borrowed") + far["borrowed"], words, texts)
    held_back += lent[: far["borrowed"]]
    kept += [*made.facts, *phrased[far["phrases"] :], *lent[far["borrowed"] :]]
    rng.shuffle(kept)
    missed = [near_miss(rng, fact.question, words) for fact in kept[:nearly]]
    held_back += [Fact("", question, ABSENT) for question in missed if question]
    stated = {_meaning(fact.question) for fact in kept}
    unknown = [
        replace(fact, statement="", answer=ABSENT)
        for fact in held_back
        if _meaning(fact.question) not in stated
    ]
    return kept, [*made.absent, *unknown]


_WORDINGS = ("revalued", "forms", "phrases", "borrowed")
_WORDING_SHARES = (35, 20, 30, 15)


def _borrowed(rng: random.Random, count: int, words: list[str], texts: Texts | None) -> list[Fact]:
    """Facts of real sentences, and of made-up ones where no real ones are to be had."""
    found = [texts and borrowed_fact(rng, texts) for _ in range(count)]
    facts = list({_meaning(fact.question): fact for fact in found if fact}.values())
    return [*facts, *phrased_facts(rng, count - len(facts), words)]


def _meaning(question: str) -> frozenset[str]:
    """What a question of `facts` asks for, the same however it is put: `X's code`, `the code for X`."""
    said = question.rstrip("?").lower().replace("'s ", " ").split()
    return frozenset(said) - {"who", "what", "is", "the", "of", "for"}


def _mention(rng: random.Random, question: str, words: list[str]) -> str:
    """Text that speaks of what an unanswerable question asks about, and does not answer it."""
    asked = question.rstrip("?").split()
    some = " ".join(asked[-rng.randrange(1, 4) :])
    return rng.choice(
        (" {1} {0} {2} ", "\n{1} {2} {0}.\n", " the {0} {1} {2}. ", "\n# {1}: {0} {2}\n")
    ).format(some, rng.choice(words), rng.choice(words))


def training_sequence(
    tokenizer: Any,
    haystack: Haystack,
    rng: random.Random,
    length: int,
    facts: int,
    written: float = 0.0,
    absent: float = 0.0,
    prose: Texts | None = None,
) -> Sequence:
    """A sequence of exactly `length` tokens: bos (if the tokenizer has one), a document with hidden facts,
    then all questions answered; `written` and `absent` as in `mixed_facts`. The document is of `prose`
    where it is given, else of the haystack.

    Raises ValueError if the questions alone do not fit.
    """
    words = haystack.words if prose is None else prose.words
    chosen, missing = mixed_facts(rng, facts, words, written, absent, prose)
    asked = rng.sample([*chosen, *missing], len(chosen) + len(missing))
    prompts = tokenizer([format_question(f.question) for f in asked], add_special_tokens=False)["input_ids"]
    answers = tokenizer([" " + f.answer for f in asked], add_special_tokens=False)["input_ids"]
    tail, marks = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        tail += [*prompt, *answer, tokenizer.eos_token_id]
        marks += [False] * len(prompt) + [True] * (len(answer) + 1)
    statements = [f.statement if prose else place(rng, f) for f in chosen]
    often = (0, 0, 0, 1, 1) if prose else (0, 1, 1, 2, 3)
    noise = [_decoy(rng, f, words) for f in chosen for _ in range(rng.choice(often))]
    noise += [_mention(rng, f.question, words) for f in missing if rng.random() < 0.4]
    statements += [text.strip() for text in noise] if prose else noise
    rng.shuffle(statements)
    used = sum(len(ids) for ids in tokenizer(statements, add_special_tokens=False)["input_ids"])
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(start) - len(tail) - used
    if room < 0:
        raise ValueError(f"{facts} facts need {length - room} tokens, the sequence has {length}")
    if prose:
        body = hide_in_prose(tokenizer, rng, prose, room + used, statements)
    else:
        between = 0.7 if written or absent else 0.0
        body = hide(tokenizer, rng, haystack.span(rng, room), statements, between)
        if len(body) < room + used:  # white space that was left out
            body = np.concatenate([haystack.real_span(rng, room + used)[: room + used - len(body)], body])
    ids = np.concatenate([start, body, tail]).astype(np.int32)
    answer = np.concatenate([np.zeros(len(start) + len(body), bool), marks])
    return Sequence(ids, answer, tuple(asked))
