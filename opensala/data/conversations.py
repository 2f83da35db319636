"""Conversations about documents, made as they are needed: questions that a model answers from what it has
read.

Each is a list of chat messages whose answers follow from the text alone: values hidden in prose (one, several
at once, over many turns), facts that are absent, sentences to find, continue and quote in the document as it
is, and short instructions. Number n of a seed is the same whenever it is asked for. It knows the length of
texts in characters; that of a conversation in tokens is measured by whoever packs it.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .facts import Fact, random_facts
from .written import ABSENT, written_facts

Message = dict[str, str]
NOT_FOUND = "Not found: the text does not say."  # ABSENT, as a sentence
_SENTENCE = re.compile(r"(?<=[a-z0-9)\"'][.?!])\s+(?=[A-Z\"'])")
_BRIEF = (
    "Answer with the value only.",
    "Answer as briefly as possible.",
    "Give only the value.",
    "Just the value, please.",
)
_SHARES = {"values": 50, "several": 12, "passages": 22, "keys": 8, "instructions": 8}
TASKS = tuple(_SHARES)
_CHARACTERS_PER_FACT = 450  # of a document: no more facts than it carries without becoming a list of them
_MOST_FACTS = 12


@dataclass(frozen=True)
class Conversation:
    """Messages of the roles user and assistant in turns, and the kind of task, of TASKS."""

    task: str
    messages: list[Message]


class Texts:
    """Documents to ask about, drawn by length.

    Args:
        documents: real texts; long ones are cut, short ones follow one another.

    Raises:
        ValueError: no text at all.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = [text for text in documents if text.strip()]
        if not self.documents:
            raise ValueError("texts: there is no document to ask about")
        total, self._ends = 0, []
        for text in self.documents:
            total += len(text)
            self._ends.append(total)
        self.words = self._words()

    def _words(self) -> list[str]:
        """Words that statements may borrow: a sample of what the documents say."""
        step = max(1, len(self.documents) // 50)
        found = re.findall(r"\b[a-z]{4,11}\b", " ".join(text[:4000] for text in self.documents[::step]))
        return sorted(set(found))

    def draw(self, rng: random.Random, characters: int) -> str:
        """About so many characters of consecutive text that begins with a sentence."""
        n = rng.choices(range(len(self.documents)), cum_weights=self._ends)[0]
        text = self.documents[n]
        start = rng.randrange(max(1, len(text) - characters)) if len(text) > characters else 0
        if start:
            found = _SENTENCE.search(text, start)
            start = found.end() if found and found.end() - start < 2000 else start
        parts, have = [text[start : start + characters]], len(text) - start
        while have < characters:
            n = (n + 1) % len(self.documents)
            parts.append(self.documents[n][: characters - have])
            have += len(self.documents[n])
        return "\n\n".join(parts)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in order, without the white space between them."""
    return [s.strip() for part in text.split("\n") for s in _SENTENCE.split(part)]


def sentences(text: str) -> list[str]:
    """The sentences of a text that are plain enough to ask about: 40 to 240 characters, each once."""
    kept = [s for s in split_sentences(text) if 40 <= len(s) <= 240 and s[0].isupper() and s[-1] in ".?!"]
    return [s for s in dict.fromkeys(kept) if text.count(s) == 1]


def insert(rng: random.Random, text: str, statements: Sequence[str]) -> str:
    """Put sentences into a text, each behind a sentence or a paragraph at a random depth."""
    places = [0, *(m.end() for m in _SENTENCE.finditer(text)), len(text)]
    cuts = sorted((rng.choice(places), n) for n in range(len(statements)))
    parts, last = [], 0
    for cut, n in cuts:
        parts.append(text[last:cut])
        before = parts[-1][-1:] or "\n"
        own_line = rng.random() < 0.3 or (cut and not before.isspace())
        parts.append(f"\n\n{statements[n]}\n\n" if own_line else f"{statements[n]} ")
        last = cut
    return "".join([*parts, text[last:]]).strip()


def _ask(rng: random.Random, document: str, question: str) -> str:
    """The first message: the document, and a question behind it or before it."""
    return rng.choice(
        (
            f"{document}\n\n{question}",
            f"{document}\n\n{question}",
            f"{document}\n\nQuestion: {question}",
            f"Read the text and answer the question.\n\n{document}\n\n{question}",
            f"{question}\n\n{document}",
        )
    )


def _turns(rng: random.Random, document: str, asked: Sequence[tuple[str, str]]) -> list[Message]:
    """Questions and answers about a document, which stands in the first message."""
    messages: list[Message] = []
    for question, answer in asked:
        content = question if messages else _ask(rng, document, question)
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _value_turn(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """A question and its answer: the value where only that is asked for, else the sentence that says it."""
    if rng.random() < 0.5:
        return f"{fact.question} {rng.choice(_BRIEF)}", fact.answer if fact.statement else NOT_FOUND
    sentence = fact.statement.removeprefix("Please note that ").removeprefix("Remember that ")
    return fact.question, sentence[:1].upper() + sentence[1:] if fact.statement else NOT_FOUND


class Conversations:
    """Endless conversations about texts.

    Args:
        texts: what they are about.
        seed: of everything drawn.
        tasks: of TASKS, in shares of their own; all if empty.

    Raises:
        ValueError: an unknown task.
    """

    def __init__(self, texts: Texts, seed: str, tasks: Sequence[str] = ()) -> None:
        unknown = [task for task in tasks if task not in _SHARES]
        if unknown:
            raise ValueError(f"tasks must be of {', '.join(TASKS)}, got {unknown[0]!r}")
        self.texts, self.seed = texts, seed
        self.tasks = tuple(tasks) or TASKS
        self._makers: dict[str, Callable[[random.Random, int], list[Message]]] = {
            "values": self._values,
            "several": self._several,
            "passages": self._passages,
            "keys": self._keys,
            "instructions": self._instructions,
        }

    def conversation(self, number: int, characters: int, task: str | None = None) -> Conversation:
        """Conversation `number`, of about so many characters in all (at least a few hundred)."""
        rng = random.Random(f"{self.seed} {number}")
        drawn = rng.choices(self.tasks, [_SHARES[name] for name in self.tasks])[0]
        chosen = task or drawn
        return Conversation(chosen, self._makers[chosen](rng, max(400, characters)))

    def _count(self, rng: random.Random, characters: int) -> int:
        return rng.randrange(1, max(2, min(_MOST_FACTS, characters // _CHARACTERS_PER_FACT) + 1))

    def _values(self, rng: random.Random, characters: int) -> list[Message]:
        """Values hidden in prose, asked for one by one among questions whose fact is absent."""
        count = self._count(rng, characters)
        absent = sum(rng.random() < 0.25 for _ in range(count)) or int(rng.random() < 0.2)
        made = written_facts(rng, count, absent, self.texts.words)
        turns = [_value_turn(rng, fact) for fact in (*made.facts, *made.absent)]
        rng.shuffle(turns)
        if rng.random() < 0.3:  # many are hidden, one is asked for
            turns = turns[:1]
        statements = [fact.statement for fact in made.facts]
        return self._about(rng, characters, statements, turns)

    def _several(self, rng: random.Random, characters: int) -> list[Message]:
        """Several values in one question, some of them absent."""
        made = written_facts(
            rng, max(2, self._count(rng, characters)), int(rng.random() < 0.3), self.texts.words
        )
        asked = rng.sample(made.facts, rng.randrange(2, min(5, len(made.facts) + 1))) + made.absent
        rng.shuffle(asked)
        listed = "\n".join(f"{n}. {fact.question}" for n, fact in enumerate(asked, 1))
        answer = "\n".join(f"{n}. {fact.answer}" for n, fact in enumerate(asked, 1))
        question = (
            f"Answer these questions with values only; say {ABSENT!r} where the text has none.\n{listed}"
        )
        return self._about(rng, characters, [fact.statement for fact in made.facts], [(question, answer)])

    def _keys(self, rng: random.Random, characters: int) -> list[Message]:
        """Names and keys with numbers, as in tests of retrieval."""
        facts = random_facts(rng, self._count(rng, characters), self.texts.words)
        turns = [(fact.question, fact.answer) for fact in rng.sample(facts, len(facts))]
        return self._about(rng, characters, [fact.statement for fact in facts], turns)

    def _passages(self, rng: random.Random, characters: int) -> list[Message]:
        """Sentences of the document as it is: continued, completed, quoted."""
        document = self.texts.draw(rng, characters)
        known = sentences(document)
        turns: list[tuple[str, str]] = []
        for _ in range(self._count(rng, characters)):
            turn = _passage_turn(rng, document, known)
            if turn and turn not in turns:
                turns.append(turn)
        if not turns:  # a text without sentences: tables, lists, verse
            return self._values(rng, characters)
        return _turns(rng, document, turns)

    def _instructions(self, rng: random.Random, characters: int) -> list[Message]:
        """A short instruction with a checkable answer on a sentence or two."""
        known = sentences(self.texts.draw(rng, 3000))
        if not known:
            return self._values(rng, characters)
        return _instruction(rng, rng.choice(known))

    def _about(
        self, rng: random.Random, characters: int, statements: Sequence[str], turns: Sequence[tuple[str, str]]
    ) -> list[Message]:
        used = sum(map(len, statements)) + sum(len(q) + len(a) for q, a in turns)
        text = self.texts.draw(rng, max(200, characters - used))
        return _turns(rng, insert(rng, text, statements), turns)


def _passage_turn(rng: random.Random, document: str, known: Sequence[str]) -> tuple[str, str] | None:
    """A question about a sentence that stands in the document once; None if the one drawn gives none."""
    if not known:
        return None
    sentence = rng.choice(known)
    kind = rng.randrange(4)
    if kind == 0:
        rest = document[document.index(sentence) + len(sentence) :].lstrip()
        following = _SENTENCE.split(rest.partition("\n")[0])[0].strip()
        return (
            (f'Which sentence follows directly after this one: "{sentence}"', following)
            if following in known
            else None
        )
    words = sentence.split()
    half = len(words) // 2
    if kind == 1 and len(words) >= 8:
        return f'Complete this sentence from the text: "{" ".join(words[:half])} ..."', " ".join(words[half:])
    if kind == 2:
        rare = [w for w in re.findall(r"\b\w{5,}\b", sentence) if document.count(w) == 1]
        if rare:
            return f'Quote the sentence of the text that contains the word "{rng.choice(rare)}".', sentence
        return None
    if len(words) < 8:
        return None
    gap = rng.randrange(3, len(words) - 2)
    shown = " ".join([*words[:gap], "____", *words[gap + 1 :]])
    word = words[gap].strip(".,;:?!\"'()")
    return (f'Which word of the text belongs in the gap: "{shown}"', word) if word.isalpha() else None


def _instruction(rng: random.Random, sentence: str) -> list[Message]:
    words = re.findall(r"[A-Za-z]+", sentence)
    few = rng.randrange(2, 5)
    chosen = rng.sample(words, min(len(words), few + 1))
    question, answer = rng.choice(
        (
            (f"Repeat this sentence exactly: {sentence}", sentence),
            (f"Write this sentence in capital letters: {sentence}", sentence.upper()),
            (
                f"What are the first {few} words of this sentence? {sentence}",
                " ".join(sentence.split()[:few]),
            ),
            (f"What is the last word of this sentence? {sentence}", words[-1]),
            (
                f"Put these words into alphabetical order: {', '.join(chosen)}",
                ", ".join(sorted(chosen, key=str.lower)),
            ),
            (f"Write these words in reverse order: {', '.join(chosen)}", ", ".join(reversed(chosen))),
        )
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
