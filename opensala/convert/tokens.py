"""Training sequences from files of packed tokens, which cost nothing to read: for machines that wait for no
tokenizer.

A file is a NumPy array of token ids (`.npy`, integers of any width). One of one dimension is text:
documents behind one another with an end-of-text after each, cut here into sequences of any length. One of
two dimensions holds whole tasks, `[N, length]`; beside `NAME.npy` lies `NAME.answers.npy`, `[N, length]`,
which marks the tokens of the answers. Files are mapped, not read. A folder that `data.pack` made has text to
train on, and text held out by document.

Shapes: N sequences, T tokens each.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.pack import is_packed

_HELD_OUT = 64  # of the text of every file, the last so-many-th is held out
_ANSWERS = ".answers.npy"


class Sample(NamedTuple):
    """Sequences `[N, T]` int64, and marks `[N, T]` bool on the tokens of answers; None where there are
    none."""

    ids: Tensor
    answers: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Sample":
        """Some of the sequences."""
        return Sample(self.ids[start:stop], None if self.answers is None else self.answers[start:stop])

    def to(self, device: torch.device) -> "Sample":
        """On a device; nothing waits where the memory is pinned."""
        answers = None if self.answers is None else self.answers.to(device, non_blocking=True)
        return Sample(self.ids.to(device, non_blocking=True), answers)

    def pinned(self) -> "Sample":
        """In memory from which a GPU copies while both go on."""
        return Sample(self.ids.pin_memory(), None if self.answers is None else self.answers.pin_memory())


class Shuffled:
    """An endless stream of shuffled epochs of `count` things: the order depends on the seed alone."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._known: tuple[tuple[int, int], np.ndarray] | None = None

    def draw(self, seed: int, position: int, number: int) -> list[int]:
        """Things `position` to `position + number`."""
        found = []
        for n in range(position, position + number):
            epoch, place = divmod(n, self.count)
            if self._known is None or self._known[0] != (seed, epoch):
                order = np.random.default_rng([seed, epoch]).permutation(self.count)
                self._known = (seed, epoch), order
            found.append(int(self._known[1][place]))
        return found


class PackedTokens:
    """Files of packed tokens, as the module describes them.

    Args:
        paths: files, or folders of which all `.npy` files below are taken.
        vocabulary: ids must lie below it.

    Raises:
        ValueError: a path without such a file, an array of another kind, a task without its answers, ids
            beyond the vocabulary, or no text at all.
    """

    def __init__(self, paths: Sequence[str], vocabulary: int) -> None:
        folders, files = [Path(name) for name in paths if is_packed(name)], []
        self.held_streams: list[np.ndarray] = []  # held out by document; without any, the ends of the streams
        for name in paths:
            files += self._files(Path(name) / "train" if is_packed(name) else Path(name))
        for folder in folders:
            held = sorted((folder / "held_out").glob("*.npy"))
            self.held_streams += [self._open(file, vocabulary) for file in held]
        self.streams: list[np.ndarray] = []
        self._tasks: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        digest = hashlib.sha256()
        for file in files:
            array = self._open(file, vocabulary)
            digest.update(array)  # type: ignore[arg-type]  # a mapped array is a buffer
            if array.ndim == 1:
                self.streams.append(array)
            else:
                answers = self._open_answers(file, array)
                digest.update(answers)  # type: ignore[arg-type]
                self._tasks.setdefault(array.shape[1], []).append((array, answers))
        if not self.streams:
            raise ValueError(f"tokens: {', '.join(paths)}: there is no text, an array of one dimension")
        self.fingerprint = digest.hexdigest()[:16]
        self._orders: dict[tuple[str, int], Shuffled] = {}

    @staticmethod
    def _files(path: Path) -> list[Path]:
        found = sorted(path.rglob("*.npy")) if path.is_dir() else [path]
        found = [file for file in found if not file.name.endswith(_ANSWERS)]
        if not found or not all(file.is_file() and file.suffix == ".npy" for file in found):
            raise ValueError(f"tokens: {path} is no .npy file and no folder with any")
        return found

    @staticmethod
    def _open(file: Path, vocabulary: int) -> np.ndarray:
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"tokens: {file} is no NumPy array of numbers: {error}") from error
        if array.ndim not in (1, 2) or array.dtype.kind not in "ui" or not array.size:
            raise ValueError(
                f"tokens: {file} must hold token ids in one dimension (text) or two (tasks), got "
                f"{array.dtype} {list(array.shape)}"
            )
        least, most = int(array.min()), int(array.max())
        if least < 0 or most >= vocabulary:
            raise ValueError(f"tokens: {file} has ids {least} to {most}, the vocabulary is {vocabulary:,}")
        return array

    @staticmethod
    def _open_answers(file: Path, array: np.ndarray) -> np.ndarray:
        beside = file.with_name(file.stem + _ANSWERS)
        if not beside.exists():
            raise ValueError(f"tokens: {file} holds tasks, and {beside.name} with their answers is missing")
        answers = np.load(beside, mmap_mode="r", allow_pickle=False)
        if answers.shape != array.shape:
            raise ValueError(f"tokens: {beside} must be {list(array.shape)}, got {list(answers.shape)}")
        return answers

    def _parts(self, length: int, held_out: bool) -> list[np.ndarray]:
        """The text of each file as sequences `[N, length]`, those to train on or the last ones."""
        parts = []
        for stream in self.held_streams if held_out and self.held_streams else self.streams:
            rows = stream[: len(stream) // length * length].reshape(-1, length)
            if not self.held_streams:
                kept = len(rows) - max(1, len(rows) // _HELD_OUT)
                rows = rows[kept:] if held_out else rows[:kept]
            parts.append(rows)
        return parts

    def _draw(self, kind: str, parts: list[np.ndarray], seed: int, position: int, number: int) -> np.ndarray:
        total, length = sum(map(len, parts)), parts[0].shape[1]
        if not total:
            raise ValueError(f"tokens: the text does not fill a sequence of {length:,} tokens to train on")
        order = self._orders.setdefault((kind, length), Shuffled(total))
        found = []
        for n in order.draw(seed, position, number):
            for part in parts:
                if n < len(part):
                    found.append(part[n])
                    break
                n -= len(part)
        return np.stack(found) if found else np.empty((0, length), np.int64)

    def text(self, length: int, seed: int, position: int, number: int) -> np.ndarray:
        """Sequences `[number, length]` from `position` on of an endless shuffled stream."""
        return self._draw("text", self._parts(length, False), seed, position, number)

    def held_out(self, length: int, seed: int, number: int) -> np.ndarray:
        """Up to `number` sequences that `text` never gives, `[n, length]`."""
        parts = self._parts(length, True)
        return self._draw("held out", parts, seed, 0, min(number, sum(map(len, parts))))

    def has_tasks(self, length: int) -> bool:
        return length in self._tasks

    def tasks(
        self, length: int, seed: int, position: int, number: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tasks of exactly `length` tokens with their marks, from an endless shuffled stream."""
        parts = self._tasks[length]
        order = self._orders.setdefault(("tasks", length), Shuffled(sum(len(ids) for ids, _ in parts)))
        found = []
        for n in order.draw(seed, position, number):
            for ids, answers in parts:
                if n < len(ids):
                    found.append((ids[n], answers[n].astype(bool)))
                    break
                n -= len(ids)
        return found
