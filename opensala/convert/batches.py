"""Sequences to train and to measure on, from the installation's texts or the user's, held-out text kept
apart."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.documents import read_documents
from ..data.haystack import Haystack
from ..data.pack import Packed, is_packed
from ..data.packing import PackedText
from ..data.retrieval import training_sequence
from ..data.text import KINDS, documents
from .config import ConvertConfig
from .tokens import PackedTokens, Sample

TOKENS_A_FACT = 64  # room for its statement, question, answer and some text around it
_HELD_OUT = 12  # of the user's texts, every so-many-th is held out
_PIECE = 20_000  # characters
_CHARACTERS = 3_000_000  # read of each kind of text


def facts_for(length: int) -> int:
    """Hidden facts in a sequence of `length` tokens."""
    return max(1, length // TOKENS_A_FACT)


def user_texts(paths: Sequence[str]) -> list[str]:
    """Texts of the documents of files, folders and patterns (JSONL, Parquet, text).

    Raises:
        ValueError: a path without documents, a malformed line (file and line), documents without text, or
            more text than is read into memory here.
    """
    texts, total = [], 0
    for path in paths:
        found = [document.text for document in read_documents(path) if document.text]
        if not found:
            raise ValueError(f"data: {path} holds no texts")
        total += sum(map(len, found))
        if total > 3 * _CHARACTERS:
            raise ValueError(
                f"data: {', '.join(paths)} hold more than the {3 * _CHARACTERS:,} characters that are read "
                "into memory: pack them (opensala convert pack) and give the folder as data"
            )
        texts += found
    return texts


def parted(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pieces to train on and held out: of every twelfth document where there are as many, so that no document
    lies on both sides; of fewer, every twelfth piece."""
    whole = len(texts) >= _HELD_OUT
    parts = list(texts) if whole else _pieces(texts)
    stride = min(_HELD_OUT, max(2, len(parts)))
    held = parts[stride - 1 :: stride]
    train = [part for n, part in enumerate(parts) if n % stride != stride - 1]
    return _pieces(train), _pieces(held)


def _pieces(texts: Sequence[str]) -> list[str]:
    """Long texts in pieces."""
    return [text[i : i + _PIECE] for text in texts for i in range(0, len(text), _PIECE)]


class Batches:
    """Batches by phase and step. The same configuration gives the same batches whenever it is asked.

    Raises ValueError if there is too little text for one sequence to train on and one to measure with.
    """

    def __init__(self, tokenizer: Any, config: ConvertConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        packed = config.tokens or (config.data if len(config.data) == 1 and is_packed(config.data[0]) else ())
        for folder in filter(is_packed, packed):
            Packed(folder).check_tokenizer(tokenizer)
        self.packed = PackedTokens(packed, len(tokenizer)) if packed else None
        if self.packed is not None:
            train, held = self._decoded(self.packed)
        elif config.data:
            train, held = parted(user_texts(config.data))
        else:
            train, held = list(_builtin("train", config.seed)), list(_builtin("held_out", config.seed))
        self.fingerprint = hashlib.sha256("\0".join([*train, "", *held]).encode()).hexdigest()[
            :16
        ]  # of the texts
        if self.packed is not None:
            self.fingerprint = self.packed.fingerprint
        name = f"data ({', '.join(config.data) or 'the texts of this Python installation'})"
        self._texts = {config.length: PackedText(tokenizer, train, config.length, name, 3 * _CHARACTERS)}
        self._name = name
        self.held_out = PackedText(
            tokenizer, held, config.probes.length, f"the held-out part of {name}", _CHARACTERS
        )
        self.haystack = Haystack(tokenizer, _CHARACTERS, config.seed, texts=train)
        self._held_haystack = Haystack(tokenizer, _CHARACTERS, config.seed, texts=held)

    def _decoded(self, packed: PackedTokens) -> tuple[list[str], list[str]]:
        """Some of the packed text to train on and of that held out, as text, for hidden facts to lie in."""
        length = max(self.config.length, self.config.probes.length)
        rows = _CHARACTERS // (4 * length) + 1  # a token has some four characters
        return tuple(
            self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for ids in (
                packed.text(length, self.config.seed, 0, rows),
                packed.held_out(length, self.config.seed, rows),
            )
        )

    def train(self, phase: str, step: int, count: int) -> Sample:
        """`count` sequences of the phase's length: packed text, and a share with hidden facts."""
        config, settings = self.config, self.config.phases()[phase]
        length = config.length_of(phase)
        share = config.task_share if settings.task_share is None else settings.task_share
        rng = random.Random(f"{config.seed} {phase} {step}")
        number = sum(rng.random() < share for _ in range(count))
        seed, position = config.seed + len(phase), step * count
        tasks = self._tasks(rng, length, seed, position, number)
        text = self._text(length).draw(seed, position, count - number)
        ids = torch.from_numpy(np.stack([*(row for row, _ in tasks), *text]).astype(np.int64))
        answers = torch.zeros(ids.shape, dtype=torch.bool)
        for marks, (_, found) in zip(answers, tasks, strict=False):
            marks.copy_(torch.from_numpy(np.array(found)))
        return Sample(ids, answers)

    def _text(self, length: int) -> "PackedText | _PackedRows":
        """What gives sequences of text of a length."""
        if self.packed is not None:
            return _PackedRows(self.packed, length)
        if length not in self._texts:
            self._texts[length] = self._texts[self.config.length].cut(length, self._name)
        return self._texts[length]

    def _tasks(
        self, rng: random.Random, length: int, seed: int, position: int, number: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`number` sequences with hidden facts: ready ones where there are any of this length."""
        if self.packed is not None and self.packed.has_tasks(length):
            return self.packed.tasks(length, seed, position, number)
        return [self.task(self.haystack, rng, length) for _ in range(number)]

    def task(self, haystack: Haystack, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One sequence with hidden facts, and the mark on its answers."""
        facts = facts_for(length)
        while True:
            try:
                sequence = training_sequence(self.tokenizer, haystack, rng, length, facts)
                return sequence.ids, sequence.answer
            except ValueError:  # these facts do not fit: others, or one less
                facts = max(1, facts - (rng.random() < 0.3))

    def recall_probes(self, length: int, count: int) -> tuple[Tensor, Tensor]:
        """`[count, length]` token ids in held-out text, and marks on answers."""
        rng = random.Random(f"recall {self.config.seed} {length}")
        pairs = [self.task(self._held_haystack, rng, length) for _ in range(count)]
        ids, marks = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(marks)

    def text_probes(self, count: int) -> Tensor:
        """Up to `count` sequences of held-out text, `[n, probes.length]`."""
        if self.packed is not None:
            rows = self.packed.held_out(self.config.probes.length, self.config.seed, count)
            return torch.from_numpy(rows.astype(np.int64))
        return torch.from_numpy(
            self.held_out.draw(self.config.seed, 0, min(count, len(self.held_out))).astype(np.int64)
        )


class _PackedRows:
    """`PackedText.draw` of packed tokens."""

    def __init__(self, packed: PackedTokens, length: int) -> None:
        self.packed, self.length = packed, length

    def draw(self, seed: int, position: int, count: int) -> np.ndarray:
        return self.packed.text(self.length, seed, position, count)


def _builtin(part: str, seed: int) -> Iterator[str]:
    for kind in KINDS:
        texts, total = list(documents(kind, part)), 0
        random.Random(seed).shuffle(texts)
        for text in texts:
            if total > _CHARACTERS:
                break
            total += len(text)
            yield text
