"""NoLiMa from its published needle sets and haystacks (not part of this package; their licence is
non-commercial).

A folder holds `needlesets/*.json` and `haystack/**/*.txt`, or the files are in the folder itself. A needle
shares no word with its question; it is put at 26 depths into a window of each book. Needle sets, placement,
character choice, prompt and scoring follow the published harness; a book too short for a length is refused,
as there.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.prompts import PromptFormat
from .jsonl import check_fields
from .samples import Group, Sample
from .scoring import NOLIMA_RULES

LENGTHS = (
    250,
    500,
    1000,
    2000,
    4000,
    8000,
    16000,
    32000,
    64000,
    128000,
)  # as the benchmark counts: 32K is 32,000
BASE_LENGTHS = (250, 500, 1000)
EFFECTIVE = 0.85  # of the base score
DEPTHS = 26
BUDGET = 192
_SEED = 42


@dataclass(frozen=True)
class Needle:
    """One needle with one of its questions and one set of words filled in."""

    id: str
    kind: str  # onehop, twohop, direct, ...
    number: int
    text: str
    question: str
    system: str
    template: str
    gold: tuple[str, ...]  # empty: the name that was drawn
    names: tuple[str, ...]


class NoLiMaSuite:
    """NoLiMa's needles in its books.

    Args:
        folder: see the module.
        template: the text around book and question, with `{haystack}` and `{question}`, for needles that
            bring none of their own; None reads it from `template.txt` in the folder.
        lengths: tokens of the book's window; the prompt around it comes on top, as in the published harness.
        samples: depths of each needle, question and book that are run (evenly chosen of the 26); 0 for all.
        rule: `contains` (the published one), `EM`, `lastline_contains` or `lastline_EM`.

    Raises:
        ValueError: files missing or without their fields; an unknown rule.
    """

    name = "nolima"

    def __init__(
        self,
        folder: Path,
        lengths: tuple[int, ...] = (1000,),
        samples: int = 0,
        rule: str = "contains",
        template: str | None = None,
    ) -> None:
        if rule not in NOLIMA_RULES:
            raise ValueError(f"nolima: rule must be one of {', '.join(NOLIMA_RULES)}, got {rule!r}")
        self._sets = sorted(
            (folder / "needlesets").glob("*.json")
            if (folder / "needlesets").is_dir()
            else folder.glob("needle*.json")
        )
        self._books = sorted(
            (folder / "haystack").rglob("*.txt")
            if (folder / "haystack").is_dir()
            else folder.glob("*book*.txt")
        )
        if not self._sets or not self._books:
            raise ValueError(
                f"{folder}: needs needlesets/*.json and haystack/**/*.txt from NoLiMa's data; "
                f"found {len(self._sets)} needle sets and {len(self._books)} books"
            )
        self._needles = [needle for file in self._sets for needle in read_needles(file)]
        if template is None:
            template = "" if all(n.template for n in self._needles) else _template(folder / "template.txt")
        self._template, self._lengths, self._samples, self._rule = template, lengths, samples, rule

    def settings(self) -> dict[str, Any]:
        files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in (*self._sets, *self._books)}
        return {
            "rule": self._rule,
            "template": hashlib.sha256(self._template.encode()).hexdigest()[:16],
            **files,
        }

    def longest(self) -> int:
        return max(self._lengths) + 1000

    def groups(self, form: PromptFormat) -> Iterator[Group]:
        every = range(DEPTHS)
        depths = [
            every[round(i * (DEPTHS - 1) / max(1, self._samples - 1))]
            for i in range(min(self._samples, DEPTHS))
        ] or list(every)
        for number, path in enumerate(self._books):
            book = Book(path, form.tokenizer)
            for length in self._lengths:
                for needle in self._needles:
                    for depth in depths:
                        id = f"nolima/{needle.id}/{path.stem}/{length}/{depth}"
                        yield Group((id,), partial(self._load, id, needle, book, number, length, depth, form))

    def _load(
        self, id: str, needle: Needle, book: "Book", number: int, length: int, depth: int, form: PromptFormat
    ) -> list[Sample]:
        chosen = np.random.RandomState(_SEED + needle.number + number)
        names = [str(chosen.choice(needle.names)) for _ in range(DEPTHS)] if needle.names else [""] * DEPTHS
        text = needle.text.replace("{CHAR}", names[depth])
        share = depth / (DEPTHS - 1)
        haystack = book.place(text, length, share)
        asked = (
            (needle.template or self._template)
            .replace("{haystack}", haystack)
            .replace("{question}", needle.question)
        )
        messages = [{"role": "system", "content": needle.system}] if needle.system else []
        messages.append({"role": "user", "content": asked})
        gold, score = needle.gold or (names[depth],), NOLIMA_RULES[self._rule]
        return [
            Sample(
                id,
                f"nolima_{needle.kind}",
                length,
                tuple(form.encode(form.messages(messages))),
                gold,
                BUDGET,
                self._rule,
                lambda prediction: score(prediction, gold),
                share,
            )
        ]


class Book:
    """A haystack as tokens, cut into windows around a needle."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.ids: list[int] = tokenizer(
            path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
        )["input_ids"]
        pieces = {i: "\n" in tokenizer.decode([i]) for i in set(self.ids)}
        self.breaks = np.array([0, *(n for n, i in enumerate(self.ids) if pieces[i])])

    def place(self, needle: str, length: int, depth: float) -> str:
        """A window of `length` tokens with the needle on a line of its own, at the first line break at or
        after `depth`."""
        if length > len(self.ids):
            raise ValueError(
                f"{self.path}: has {len(self.ids):,} tokens, a window of {length:,} was asked for; use a "
                "longer book"
            )
        wanted = depth * (length + 1)
        later = self.breaks[self.breaks >= wanted]
        at = int(later[0]) if len(later) else len(self.ids)
        start = max(0, min(round(at - depth * length), len(self.ids) - length))
        at = min(max(at, start), start + length)
        before = self.tokenizer.decode(self.ids[start:at])
        after = self.tokenizer.decode(self.ids[at : start + length])
        if "\n" in before:
            cut = before.rfind("\n") + 1
            before, after = before[:cut], before[cut:] + after
        return f"{before} {needle}\n{after}"


def read_needles(path: Path) -> list[Needle]:
    """Every question of every test of every item of a needle set.

    Raises:
        ValueError: not JSON, or an item without its fields.
    """
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path}: must be a list of needles")
    found = []
    for n, item in enumerate(items, 1):
        where = f"{path}, item {n}"
        check_fields(item, {"id": str, "needle": str, "questions": dict, "tests": dict}, where)
        if not item["id"][:4].isdigit():
            raise ValueError(
                f"{where}: field 'id' must begin with four digits (they seed the choice of names), got "
                f"{item['id']!r}"
            )
        for kind, question in item["questions"].items():
            for test, values in item["tests"].items():
                check_fields(values, {"input_args": list}, f"{where}, test {test!r}")
                words = values["input_args"]
                found.append(
                    Needle(
                        f"{item['id']}/{kind}/{test}",
                        kind,
                        int(item["id"][:4]),
                        _fill(item["needle"], words),
                        _fill(question, words),
                        item.get("system_prompt", ""),
                        item.get("task_template", ""),
                        tuple(values.get("gold_answers", ())),
                        tuple(item.get("character_set", ())),
                    )
                )
                if "{CHAR}" in item["needle"] and not found[-1].names:
                    raise ValueError(
                        f"{where}: field 'character_set' is missing; the needle has a {{CHAR}} to fill in"
                    )
    return found


def _fill(text: str, words: list[str]) -> str:
    for n, word in enumerate(words, 1):
        text = text.replace(f"{{{n}}}", word)
    return text


def _template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path}: the prompt around book and question is not part of this package; write NoLiMa's "
            "default template "
            "into this file, with {haystack} and {question} where they belong"
        ) from error
    missing = [field for field in ("{haystack}", "{question}") if field not in text]
    if missing:
        raise ValueError(f"{path}: lacks {' and '.join(missing)}")
    return text


def effective_length(scores: dict[int, float]) -> tuple[float, int | None]:
    """Base score (the best at 250, 500 and 1,000 tokens) and the longest length that keeps 85% of it at every
    length up to it; None if not even the shortest does. ValueError without any of the short lengths."""
    short = [scores[n] for n in BASE_LENGTHS if n in scores]
    if not short:
        raise ValueError(
            f"the base score needs one of the lengths {', '.join(map(str, BASE_LENGTHS))}; there are "
            f"{sorted(scores)}"
        )
    base, effective = max(short), None
    for length in sorted(scores):
        if scores[length] < EFFECTIVE * base:
            break
        effective = length
    return base, effective
