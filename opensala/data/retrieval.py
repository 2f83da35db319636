"""Retrieval tasks as token sequences: facts hidden in a haystack, then questions and answers."""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .facts import Fact, format_question, random_facts
from .haystack import Haystack
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
    encoded = tokenizer(statements, add_special_tokens=False)["input_ids"] if statements else []
    parts, last = [], 0
    for cut, ids in zip(cuts, encoded, strict=True):
        parts += [hay[last:cut], np.array(ids, dtype=np.int32)]
        last = cut
    return np.concatenate([*parts, hay[last:]])


def mixed_facts(
    rng: random.Random, count: int, words: list[str], written: float = 0.0, absent: float = 0.0
) -> tuple[list[Fact], list[Fact]]:
    """`count` facts to hide, and questions without a fact (answer ABSENT).

    Args:
        written: chance of each fact to have a value as people write it (`written`), instead of a number or a
            name.
        absent: questions without a fact for each fact, on average.

    Half of the facts with such values are worded as in `written`, half as in `facts` (`revalued`); half of
    the unanswerable questions are of each wording.
    """
    prose = sum(rng.random() < written for _ in range(count)) if written else 0
    missing = sum(rng.random() < absent for _ in range(count)) if absent else 0
    if not prose and not missing:
        return random_facts(rng, count, words), []
    copied, withheld = prose // 2, missing // 2
    made = written_facts(rng, prose - copied, missing - withheld, words)
    drawn = random_facts(rng, count - prose + copied + withheld, words)
    rng.shuffle(drawn)
    kept, held_back = drawn[withheld:], drawn[:withheld]
    kept = [*(revalued(rng, fact) for fact in kept[:copied]), *kept[copied:]]
    stated = {_meaning(fact.question) for fact in kept}
    unknown = [
        replace(fact, statement="", answer=ABSENT)
        for fact in held_back
        if _meaning(fact.question) not in stated
    ]
    return [*kept, *made.facts], [*made.absent, *unknown]


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
) -> Sequence:
    """A sequence of exactly `length` tokens: bos (if the tokenizer has one), a document with hidden facts,
    then all questions answered; `written` and `absent` as in `mixed_facts`.

    Raises ValueError if the questions alone do not fit.
    """
    chosen, missing = mixed_facts(rng, facts, haystack.words, written, absent)
    asked = rng.sample([*chosen, *missing], len(chosen) + len(missing))
    prompts = tokenizer([format_question(f.question) for f in asked], add_special_tokens=False)["input_ids"]
    answers = tokenizer([" " + f.answer for f in asked], add_special_tokens=False)["input_ids"]
    tail, marks = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        tail += [*prompt, *answer, tokenizer.eos_token_id]
        marks += [False] * len(prompt) + [True] * (len(answer) + 1)
    statements = [place(rng, f) for f in chosen]
    statements += [_decoy(rng, f, haystack.words) for f in chosen for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    statements += [_mention(rng, f.question, haystack.words) for f in missing if rng.random() < 0.4]
    rng.shuffle(statements)
    used = sum(len(ids) for ids in tokenizer(statements, add_special_tokens=False)["input_ids"])
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(start) - len(tail) - used
    if room < 0:
        raise ValueError(f"{facts} facts need {length - room} tokens, the sequence has {length}")
    between = 0.7 if written or absent else 0.0
    body = hide(tokenizer, rng, haystack.span(rng, room), statements, between)
    ids = np.concatenate([start, body, tail]).astype(np.int32)
    answer = np.concatenate([np.zeros(len(start) + len(body), bool), marks])
    return Sequence(ids, answer, tuple(asked))
