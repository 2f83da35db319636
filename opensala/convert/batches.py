"""Sequences to train and to measure on, from the installation's texts or the user's, held-out text kept
apart."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.haystack import Haystack
from ..data.packing import PackedText
from ..data.retrieval import training_sequence
from ..data.text import KINDS, documents, read_text
from .config import ConvertConfig

TOKENS_A_FACT = 64  # room for its statement, question, answer and some text around it
_HELD_OUT = 12  # of the user's texts, every so-many-th piece is held out
_PIECE = 20_000  # characters
_CHARACTERS = 3_000_000  # read of each kind of text


def facts_for(length: int) -> int:
    """Hidden facts in a sequence of `length` tokens."""
    return max(1, length // TOKENS_A_FACT)


def user_texts(paths: Sequence[str]) -> list[str]:
    """The UTF-8 files among and below the paths, long ones in pieces. Raises ValueError for a path that holds
    none."""
    texts = []
    for name in paths:
        path = Path(name)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found = [text for text in map(read_text, files) if text]
        if not found:
            raise ValueError(f"data: {name} holds no UTF-8 text")
        texts += [text[i : i + _PIECE] for text in found for i in range(0, len(text), _PIECE)]
    return texts


class Batches:
    """Batches by phase and step. The same configuration gives the same batches whenever it is asked.

    Raises ValueError if there is too little text for one sequence to train on and one to measure with.
    """

    def __init__(self, tokenizer: Any, config: ConvertConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        if config.data:
            pieces = user_texts(config.data)
            stride = min(_HELD_OUT, max(2, len(pieces)))
            held = pieces[stride - 1 :: stride]
            train = [piece for n, piece in enumerate(pieces) if n % stride != stride - 1]
        else:
            train, held = list(_builtin("train", config.seed)), list(_builtin("held_out", config.seed))
        self.fingerprint = hashlib.sha256("\0".join([*train, "", *held]).encode()).hexdigest()[
            :16
        ]  # of the texts
        name = f"data ({', '.join(config.data) or 'the texts of this Python installation'})"
        self.text = PackedText(tokenizer, train, config.length, name, 3 * _CHARACTERS)
        self.held_out = PackedText(
            tokenizer, held, config.probes.length, f"the held-out part of {name}", _CHARACTERS
        )
        self.haystack = Haystack(tokenizer, _CHARACTERS, config.seed, texts=train)
        self._held_haystack = Haystack(tokenizer, _CHARACTERS, config.seed, texts=held)

    def train(self, phase: str, step: int, count: int) -> Tensor:
        """`[count, length]` token ids: packed text, and a share of sequences with hidden facts."""
        rng = random.Random(f"{self.config.seed} {phase} {step}")
        tasks = sum(rng.random() < self.config.task_share for _ in range(count))
        rows = [self.task(self.haystack, rng, self.config.length)[0] for _ in range(tasks)]
        text = self.text.draw(self.config.seed + len(phase), step * count, count - tasks)
        return torch.from_numpy(np.stack([*rows, *text]).astype(np.int64))

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
        return torch.from_numpy(
            self.held_out.draw(self.config.seed, 0, min(count, len(self.held_out))).astype(np.int64)
        )


def _builtin(part: str, seed: int) -> Iterator[str]:
    for kind in KINDS:
        texts, total = list(documents(kind, part)), 0
        random.Random(seed).shuffle(texts)
        for text in texts:
            if total > _CHARACTERS:
                break
            total += len(text)
            yield text
