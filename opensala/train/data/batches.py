"""Sequences of a stage: the mixture of its sources, packed, with a position that a checkpoint holds.

The next document comes from the source that is farthest behind its share of tokens, so shares are exact at
every point and need no chance. Documents of ordinary text are cut where a sequence ends (what is left waits
to begin another one, as a document of its own); conversations stay whole, the end of a sequence is padded,
and those longer than a sequence are left out and counted.
"""

import base64
import random
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...data.documents import DocumentSource, Files, InstalledTexts, find_files
from ...data.encode import Encoder, Example
from ..loss import IGNORED
from ..recipe import Source, Stage
from .synthetic import Synthetic

_WAITING = 32  # conversations held back to fill sequences with
_OPEN = 16  # texts longer than a sequence that are taken in turns, so that one of them does not fill a batch
_TRIES = 2000  # documents looked at before a source is said to have none that fit


@dataclass(frozen=True)
class PackedSequence:
    """`ids` and `labels` `[length]` (labels are the next token within the document, -100 where there is no
    loss); `bounds` of the documents, from 0 to length."""

    ids: torch.Tensor
    labels: torch.Tensor
    bounds: list[int]


def check_source(source: Source) -> None:
    """Raise ValueError for a source without path, or whose path leads to no file."""
    if not source.path:
        raise ValueError(
            f"data: the recipe's source {source.name!r} has no path: give one with --data {source.name}=PATH"
        )
    if not source.path.startswith(("python:", "synthetic:")):
        find_files(source.path)


def open_source(
    source: Source, stage: Stage, tokenizer: Any, seed: int, skip_bad: bool, probe: bool = False
) -> DocumentSource:
    """The stream of a source's documents; with `probe` others: held-out texts, tasks of their own, files in
    another order."""
    check_source(source)
    key = f"{seed} {stage.name} {source.name}{' probe' * probe}"
    kind, _, rest = source.path.partition(":")
    if kind == "python":
        return InstalledTexts(rest, key, "held_out" if probe else "train")
    if kind == "synthetic":
        return Synthetic(rest, tokenizer, stage.sequence, key, stage.chat)
    return Files(source.path, key, skip_bad)


class StageData:
    """The endless sequences of a stage.

    Args:
        tokenizer: a transformers tokenizer.
        seed: of file orders, shuffles and synthetic tasks.
        skip_bad: leave out malformed documents instead of stopping.
        probe: to measure with, not to train on: see `open_source`.

    Raises:
        ValueError: see `Files`, `Encoder` and `Synthetic`.
    """

    def __init__(
        self, stage: Stage, tokenizer: Any, seed: int, skip_bad: bool = False, probe: bool = False
    ) -> None:
        self.stage, self.seed, self.skip_bad = stage, seed, skip_bad
        self.sources = [
            open_source(source, stage, tokenizer, seed, skip_bad, probe) for source in stage.mixture
        ]
        self.encode = Encoder(tokenizer, stage.chat)
        self.pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        )
        self.tokens = [0] * len(self.sources)
        self.drawn = [0] * len(self.sources)
        self.too_long = self.unfit = 0
        self.waiting: list[Example] = []

    @property
    def skipped(self) -> int:
        """Malformed documents left out so far."""
        return self.unfit + sum(source.skipped for source in self.sources)

    def _draw(self) -> Example:
        """The next example of the mixture."""
        behind = [
            tokens / source.weight for tokens, source in zip(self.tokens, self.stage.mixture, strict=True)
        ]
        n = behind.index(min(behind))
        source, stream = self.stage.mixture[n], self.sources[n]
        for _ in range(_TRIES):
            document = stream.next()
            self.drawn[n] += 1
            try:
                example = self.encode(document)
            except ValueError as error:
                if not self.skip_bad:
                    raise ValueError(f"data: {error}") from error
                self.unfit += 1
                continue
            if len(example.ids) > 1 and self._kept(source, n, len(example.ids)):
                self.tokens[n] += len(example.ids)
                return example
        raise ValueError(
            f"data: of {_TRIES:,} documents of {source.name!r} ({source.path}) none could be used in "
            f"{self.stage.name} "
            f"({self.unfit} malformed, {self.too_long} longer than a sequence)"
        )

    def _kept(self, source: Source, n: int, length: int) -> bool:
        if self.stage.chat and length > self.stage.sequence:
            self.too_long += 1
            return False
        if length >= source.long_from or source.long_factor <= 1:
            return True
        return (
            random.Random(f"{self.seed} {self.stage.name} {source.name} {self.drawn[n]}").random()
            < 1 / source.long_factor
        )

    def next(self) -> PackedSequence:
        """The next packed sequence."""
        length, parts, room = self.stage.sequence, [], self.stage.sequence
        while room:
            example = self._fitting(room) if self.stage.chat else self._next_text()
            if example is None:
                parts.append(Example(np.full(room, self.pad, dtype=np.int32), np.zeros(room, bool)))
                break
            if len(example.ids) > room:
                self.waiting.append(Example(example.ids[room:], example.learnt[room:]))
                example = Example(example.ids[:room], example.learnt[:room])
            parts.append(example)
            room -= len(example.ids)
        return _packed(parts, length)

    def _next_text(self) -> Example:
        return self.waiting.pop(0) if len(self.waiting) >= _OPEN else self._draw()

    def _fitting(self, room: int) -> Example | None:
        """The first waiting conversation at the start of a sequence (none waits forever), else the longest
        that fits."""
        while len(self.waiting) < _WAITING:
            self.waiting.append(self._draw())
        if room == self.stage.sequence:
            return self.waiting.pop(0)
        fitting = [n for n, example in enumerate(self.waiting) if len(example.ids) <= room]
        return self.waiting.pop(max(fitting, key=lambda n: len(self.waiting[n].ids))) if fitting else None

    def state_dict(self) -> dict[str, Any]:
        """The position: everything that decides what comes next, as JSON can hold it."""
        return {
            "tokens": list(self.tokens),
            "drawn": list(self.drawn),
            "too_long": self.too_long,
            "unfit": self.unfit,
            "sources": [source.state_dict() for source in self.sources],
            "waiting": [(_text(e.ids), _text(e.learnt)) for e in self.waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.drawn, self.too_long, self.unfit = (
            list(state["tokens"]),
            list(state["drawn"]),
            state["too_long"],
            state["unfit"],
        )
        for source, kept in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(kept)
        self.waiting = [
            Example(_array(ids, np.int32), _array(learnt, np.bool_)) for ids, learnt in state["waiting"]
        ]


def _text(x: np.ndarray) -> str:
    """An array as JSON can hold it in little space."""
    return base64.b64encode(zlib.compress(x.tobytes(), 1)).decode()


def _array(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=dtype)


def _packed(parts: list[Example], length: int) -> PackedSequence:
    bounds = [0]
    labels = np.full(length, IGNORED, dtype=np.int64)
    for part in parts:
        start, end = bounds[-1], bounds[-1] + len(part.ids)
        labels[start : end - 1] = np.where(part.learnt[1:], part.ids[1:], IGNORED)
        bounds.append(end)
    ids = torch.from_numpy(np.concatenate([part.ids for part in parts]).astype(np.int64))
    return PackedSequence(ids, torch.from_numpy(labels), bounds)
