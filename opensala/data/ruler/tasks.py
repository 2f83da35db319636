"""The table of RULER's thirteen task types, and making one document of one of them."""

import difflib
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from ..prompts import PromptFormat
from .entries import Entries
from .fit import FittedDocument, fit_document
from .needles import Needles
from .tracking import Tracking
from .types import RulerDocument
from .words import CommonWords, FrequentWords

_GOLDEN = 0.6180339887498949  # steps of this share, modulo 1, cover the depths evenly however many there are


class Builder(Protocol):
    def build(self, size: int, rng: random.Random, questions: int, depth: float) -> RulerDocument: ...


@dataclass(frozen=True)
class RulerTask:
    """One task type.

    Attributes:
        budget: tokens for the answer, part of the length.
        any_reference: one reference is enough (question answering); otherwise each counts.
        shareable: several questions can be asked about one document.
        otherwise: makes the documents of lengths that `builder` has none for.
    """

    name: str
    builder: Builder
    budget: int
    any_reference: bool = False
    shareable: bool = True
    otherwise: Builder | None = None

    def document(
        self, length: int, form: PromptFormat, *, index: int = 0, seed: int = 0, questions: int = 1
    ) -> FittedDocument:
        """Document number `index` for prompts of `length` tokens, the same for the same arguments.

        Raises:
            ValueError: see `fit_document`; fewer questions than one.
        """
        if questions < 1:
            raise ValueError(f"questions must be at least 1, got {questions}")
        asked = questions if self.shareable else 1
        depth = (random.Random(f"{seed} {self.name} {length}").random() + index * _GOLDEN) % 1

        def fitted(builder: Builder) -> FittedDocument:
            def build(size: int) -> RulerDocument:
                rng = random.Random(f"{seed} {self.name} {length} {index}")
                return builder.build(size, rng, asked, depth)

            return fit_document(build, length, self.budget, form)

        try:
            return fitted(self.builder)
        except ValueError as error:
            if self.otherwise is not None:
                with suppress(ValueError):
                    return fitted(self.otherwise)
            raise ValueError(f"{self.name}: {error}") from error


TASKS = {
    t.name: t
    for t in (
        RulerTask("niah_single_1", Needles("noise"), 128),
        RulerTask("niah_single_2", Needles("essay"), 128),
        RulerTask("niah_single_3", Needles("essay", value="uuid"), 128),
        RulerTask("niah_multikey_1", Needles("essay", keys=4), 128),
        RulerTask("niah_multikey_2", Needles("needles"), 128),
        RulerTask("niah_multikey_3", Needles("needles", key="uuid", value="uuid"), 128),
        RulerTask("niah_multivalue", Needles("essay", values=4), 128),
        RulerTask("niah_multiquery", Needles("essay", queries=4), 128),
        RulerTask("vt", Tracking(), 30),
        RulerTask("cwe", CommonWords(), 120, shareable=False, otherwise=CommonWords(long_from=1000)),
        RulerTask("fwe", FrequentWords(), 50, shareable=False),
        RulerTask("qa_1", Entries(1), 32, any_reference=True),
        RulerTask("qa_2", Entries(2), 32, any_reference=True),
    )
}


def ruler_task(name: str) -> RulerTask:
    """A task by its name; ValueError with the nearest names if there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 2)
        raise ValueError(
            f"RULER task {name!r} does not exist{f': did you mean {near[0]}?' if near else ''} Tasks: "
            f"{', '.join(TASKS)}"
        )
    return TASKS[name]
