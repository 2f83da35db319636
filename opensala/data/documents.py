"""Documents from files (JSONL, Parquet, text) through `datasets` streaming, and from the texts of the Python
installation.

A JSONL line or Parquet row holds `text`, or `messages` (a conversation, with `tools` if there are any), or
`input_ids` (tokenized already). A text file is one document. Files are taken in an order drawn for each
epoch, documents shuffled within blocks that are read whole, so that a position is a place in a file and an
offset in its block.
"""

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .text import KINDS, documents, read_text

logger = logging.getLogger("opensala")
_BLOCK, _BLOCK_CHARACTERS = 1000, 1 << 26  # documents shuffled together at most, and their characters
_TEXT = (".txt", ".md", ".rst", ".py", ".text")
_LONGEST = 200_000  # characters of one text of the installation
_CHARACTERS = 2_000_000  # of one kind: more costs tens of seconds of reading at every start


@dataclass(frozen=True)
class TrainingDocument:
    """One of `text`, `messages` and `ids`; `place` names where it stands."""

    place: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    ids: list[int] | None = None
    tools: list[Any] | None = None


class DocumentSource(Protocol):
    """An endless stream of documents. `skipped` counts bad ones that were left out."""

    skipped: int

    def next(self) -> TrainingDocument: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def installed_texts(kind: str, characters: int = _CHARACTERS, part: str = "train") -> list[str]:
    """The first texts of a kind (and part) that the Python installation carries, about so many characters."""
    chosen, total = [], 0
    for text in documents(kind, part):
        chosen.append(text[:_LONGEST])
        total += len(chosen[-1])
        if total >= characters:
            break
    return chosen


def pool(path: str, characters: int) -> list[str]:
    """Texts of a path's documents, in the order of the files, up to so many characters.

    Raises ValueError for a path without documents, a malformed line, or documents without text.
    """
    chosen, total = [], 0
    for document in read_documents(path):
        if document.text:
            chosen.append(document.text)
            total += len(document.text)
        if total >= characters:
            break
    if not chosen:
        raise ValueError(f"data: {path} holds no texts: questions are asked about documents with text")
    return chosen


def read_documents(path: str, skip_bad: bool = False) -> Iterator[TrainingDocument]:
    """All documents of a path once, in the order of the files; see `Files`."""
    yield from Files(path, "in order", skip_bad, shuffled=False).once()


class InstalledTexts:
    """One kind of text of the Python installation, each epoch in another order; `part` as in
    `opensala.data.text`."""

    def __init__(self, kind: str, seed: str, part: str = "train") -> None:
        if kind not in KINDS:
            raise ValueError(f"python: must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        self.texts = installed_texts(kind, _CHARACTERS if part == "train" else _CHARACTERS // 10, part)
        if not self.texts:
            raise ValueError(
                f"python:{kind}: this Python installation carries no such texts; give files instead"
            )
        self.seed, self.kind, self.position, self.skipped = seed, kind, 0, 0
        self._epoch, self._order = -1, list(range(len(self.texts)))

    def next(self) -> TrainingDocument:
        epoch, place = divmod(self.position, len(self.texts))
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                random.Random(f"{self.seed} {epoch}").sample(range(len(self.texts)), len(self.texts)),
            )
        self.position += 1
        return TrainingDocument(
            f"python:{self.kind} {self._order[place]}", text=self.texts[self._order[place]]
        )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def find_files(path: str) -> list[str]:
    """The data files of a file, folder or pattern, sorted. Raises ValueError if there are none."""
    given = Path(path)
    if given.is_dir():
        found = [p for p in given.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".parquet", *_TEXT)]
    elif given.is_file():
        found = [given]
    else:
        anchor = Path(given.anchor or ".")
        found = (
            [
                p
                for p in anchor.glob(str(given.relative_to(given.anchor)) if given.anchor else path)
                if p.is_file()
            ]
            if path
            else []
        )
    if not found:
        raise ValueError(
            f"data: {path} holds no documents: give a JSONL, Parquet or text file, a folder of them, or a "
            "pattern"
        )
    kinds = {"parquet" if p.suffix == ".parquet" else "lines" for p in found}
    if len(kinds) > 1:
        raise ValueError(f"data: {path} mixes Parquet with other files: give them as two sources")
    return sorted(map(str, found))


def _read(files: list[str]) -> Iterator[dict[str, Any]]:
    """Lines of JSONL files and whole text files, as they are, with their place."""
    for file in files:
        if not file.endswith(".jsonl"):
            yield {"file": file, "line": 0, "content": read_text(Path(file))}
            continue
        with open(file, encoding="utf-8", errors="replace") as lines:
            for n, line in enumerate(lines, 1):
                if line.strip():
                    yield {"file": file, "line": n, "content": line}


def _check_parquet(files: list[str]) -> None:
    """Raise ValueError, naming it, for a file that is called Parquet and cannot be read as such: the reader
    does not say which one it was."""
    for file in files:
        if file.endswith(".parquet"):
            import pyarrow.parquet

            try:
                pyarrow.parquet.read_metadata(file)
            except pyarrow.ArrowException as error:
                raise ValueError(f"data: {file} cannot be read as Parquet: {error}") from error


class Files:
    """Documents of files. See the module.

    Args:
        skip_bad: count and leave out what is not a document, instead of stopping.
        shuffled: in an order drawn for each epoch; else files by name and documents as they stand.

    Raises:
        ValueError: no files; while reading: a malformed line (file and line are named) or no document at all.
    """

    def __init__(self, path: str, seed: str, skip_bad: bool = False, shuffled: bool = True) -> None:
        self.shuffled = shuffled
        self.files, self.path, self.seed, self.skip_bad = find_files(path), path, seed, skip_bad
        self.epoch, self.offset, self.skipped, self.rows = 0, 0, 0, 0
        self._good = 0  # documents of this epoch so far
        self._block: list[TrainingDocument] | None = None
        _check_parquet(self.files)
        self._open(None)

    def _open(self, state: dict[str, Any] | None) -> None:
        """Stand at the start of an epoch, or at a state in it."""
        from datasets import IterableDataset, load_dataset
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        order = self.files
        if self.shuffled:
            order = random.Random(f"{self.seed} {self.epoch}").sample(self.files, len(self.files))
        if order[0].endswith(".parquet"):
            self._data = load_dataset("parquet", data_files=order, split="train", streaming=True)
        else:
            self._data = IterableDataset.from_generator(_read, gen_kwargs={"files": order})
        if state is not None:
            self._data.load_state_dict(state)
        self._start = state if state is not None else self._data.state_dict()
        self._items = iter(self._data)

    def next(self) -> TrainingDocument:
        while self._block is None or self.offset >= len(self._block):
            if self._block is not None:  # done with it: the next one begins where the reading stands
                self._start, self.offset, self._counts = self._data.state_dict(), 0, self._now()
            self._fill()
        self.offset += 1
        return self._block[self.offset - 1]

    def once(self) -> Iterator[TrainingDocument]:
        """The documents of one epoch, from its beginning; the stream stands at the next one's afterwards."""
        epoch = self.epoch
        while True:
            self._fill()
            if self.epoch != epoch:
                return
            assert self._block is not None, "filled, or the epoch has ended"
            yield from self._block

    def _now(self) -> tuple[int, int, int]:
        return self.rows, self.skipped, self._good

    _counts = (0, 0, 0)  # rows, skipped and good at the start of the block

    def _fill(self) -> None:
        """Read the block that begins here, shuffled; the next epoch begins where the files end."""
        block, characters, first = [], 0, self.rows
        for row in self._items:
            self.rows += 1
            document = self._document(row)
            if document is not None:
                block.append(document)
                characters += len(document.text or "") + 8 * len(document.ids or "")
            if len(block) >= _BLOCK or characters >= _BLOCK_CHARACTERS:
                break
        else:
            if not block:
                if not self._good:
                    raise ValueError(
                        f"data: {self.path} holds no documents ({self.skipped} bad ones skipped)"
                    )
                self.epoch, self.rows, self._good, self._block, self.offset = self.epoch + 1, 0, 0, None, 0
                self._open(None)
                self._counts = self._now()
                return
        self._good += len(block)
        if self.shuffled:
            random.Random(f"{self.seed} {self.epoch} {first}").shuffle(block)
        self._block = block

    def _document(self, row: dict[str, Any]) -> TrainingDocument | None:
        """A row as a document; None for a bad one that is skipped."""
        place = (
            f"{row['file']} line {row['line']}"
            if "line" in row and "file" in row
            else f"{self.path} row {self.rows}"
        )
        if place.endswith(" line 0"):
            place = row["file"]
        try:
            return parse(row, place)
        except ValueError as error:
            if not self.skip_bad:
                raise ValueError(
                    f"data: {error}; correct it, or leave such documents out (--skip-bad-data of opensala "
                    "train and opensala convert pack)"
                ) from error
            self.skipped += 1
            logger.info("skipped: %s", error)
            return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "start": self._start,
            "offset": self.offset,
            "counts": list(self._counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._block = state["epoch"], None
        self._counts = tuple(state["counts"])
        self.rows, self.skipped, self._good = self._counts
        self._open(state["start"])
        self._fill()
        self.offset = state["offset"]


def parse(row: dict[str, Any], place: str) -> TrainingDocument:
    """A row of a file as a document; ValueError saying what is wrong with it, beginning with its place."""
    record: Any = row
    if "content" in row and "line" in row:
        if row["content"] is None:
            raise ValueError(f"{place} is not UTF-8 text")
        if row["line"] == 0:
            return TrainingDocument(place, text=row["content"])
        try:
            record = json.loads(row["content"])
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(record).__name__}")
    if isinstance(record.get("messages"), list):
        for n, message in enumerate(record["messages"]):
            if (
                not isinstance(message, dict)
                or not isinstance(message.get("role"), str)
                or "content" not in message
            ):
                raise ValueError(
                    f"{place}: messages[{n}] must have role and content, got {str(message)[:80]}"
                )
        return TrainingDocument(place, messages=record["messages"], tools=record.get("tools"))
    if isinstance(record.get("text"), str):
        return TrainingDocument(place, text=record["text"])
    ids = record.get("input_ids")
    if isinstance(ids, list) and all(isinstance(t, int) and t >= 0 for t in ids):
        return TrainingDocument(place, ids=ids)
    raise ValueError(
        f"{place} must have text (a string), messages (a list) or input_ids (numbers), it has "
        f"{', '.join(map(str, record)) or 'nothing'}"
    )
