"""The documents of files as packed tokens on disk: read once, streamed, all of them used.

A source is a file, folder or pattern of JSONL, Parquet or text files (`documents`). Its documents are
tokenized in an order drawn from the seed and written one behind the other, an end-of-text after each, as one
array of token ids (`train/NAME.npy`); one document in fifty goes to `held_out/NAME.npy` instead, by its
content, so that the same document is on the same side whatever stands around it. The arrays can be mapped,
and any sequence of them is a slice: a position in training is a number. Nothing is kept in memory but a
block of documents.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .documents import Files, TrainingDocument, find_files
from .encode import plain

logger = logging.getLogger("opensala")
HELD_OUT = 50  # one document in so many
_FEW = 64  # sources with fewer documents choose those held out by rank, so that there is one
_BATCH = 64  # documents tokenized at once
# what separates documents in pre-training where it is known; chat models end turns with another token
_END = "<|endoftext|>"
_RECORD = "packed.json"
_COPIED = 1 << 22  # tokens copied at once


@dataclass(frozen=True)
class PackSource:
    """A source: a name, a path, and its share of all tokens (None: as many as it has)."""

    name: str
    path: str
    share: float | None = None


def parse_sources(given: Sequence[str]) -> list[PackSource]:
    """Sources from `PATH` or `PATH=SHARE`, named after their last part.

    Raises ValueError for a share that is no number above 0, shares for some sources only, or a path without
    documents.
    """
    sources: list[PackSource] = []
    for text in given:
        path, share = text, None
        head, equals, tail = text.rpartition("=")
        if equals and not Path(text).exists():
            path, share = head, _share(text, tail)
        find_files(path)
        stem = Path(path.rstrip("/*")).stem or "data"
        taken = {source.name for source in sources}
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10**6))) if n not in taken)
        sources.append(PackSource(name, path, share))
    if not sources:
        raise ValueError("data: there is no source: give a file, a folder or a pattern")
    if len({source.share is None for source in sources}) > 1:
        raise ValueError("data: give every source a share (PATH=SHARE) or none")
    return sources


def _share(text: str, tail: str) -> float:
    try:
        share = float(tail)
    except ValueError:
        raise ValueError(f"data: {text}: the share must be a number, got {tail!r}") from None
    if not 0 < share < float("inf"):
        raise ValueError(f"data: {text}: the share must be above 0, got {share}")
    return share


class Packed:
    """A folder of packed tokens: `tokens` and `held_out` by source, `repeated` where a share needed more than
    there was."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.record: dict[str, Any] = json.loads((self.folder / _RECORD).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no packed tokens: opensala convert pack makes them") from error
        self.tokens: dict[str, int] = self.record["tokens"]
        self.held_out: dict[str, int] = self.record["held_out"]
        self.repeated: dict[str, float] = self.record["repeated"]

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError for another tokenizer than the tokens were made with."""
        if self.record["tokenizer"] != _vocabulary(tokenizer):
            raise ValueError(f"{self.folder} was packed with another tokenizer: its ids mean other tokens")


def is_packed(path: str | Path) -> bool:
    """Whether a path is a folder of packed tokens."""
    return (Path(path) / _RECORD).is_file()


def pack(
    sources: Sequence[PackSource],
    tokenizer: Any,
    folder: str | Path,
    *,
    tokens: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    advance: Callable[[int, str], None] = lambda tokens, note: None,
) -> Packed:
    """Pack sources into a folder, unless it holds exactly this already. Written beside and renamed at last.

    With shares, sources are cut, or begun anew, so that their tokens are in these shares: of `tokens`, else
    of as many as use every document of every source at least once.

    Args:
        tokens: to train on, at most, of all sources together; None for all there are.
        advance: called with the tokens written since the last call and what is being read.

    Raises:
        ValueError: a source without documents or with empty ones only, a malformed line (file and line), a
            folder of other sources, fewer than one token wanted.
    """
    target = Path(folder)
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    identity = _identity(sources, tokenizer, tokens, seed)
    if target.exists():
        found = Packed(target)
        if found.record["identity"] != identity:
            raise ValueError(
                f"{target} was packed from other sources, another tokenizer or other options: give another "
                "folder"
            )
        return found
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        record = _write(sources, tokenizer, partial, tokens, seed, skip_bad, advance)
        record |= {"identity": identity, "tokenizer": _vocabulary(tokenizer)}
        (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Packed(target)


def _identity(sources: Sequence[PackSource], tokenizer: Any, tokens: int | None, seed: int) -> str:
    """A digest of everything that decides what is written; files by size and time."""
    files = [
        (source.name, source.share, file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns)
        for source in sources
        for file in find_files(source.path)
    ]
    described = json.dumps([files, _vocabulary(tokenizer), tokens, seed])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _vocabulary(tokenizer: Any) -> str:
    """A digest of which token has which id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def _write(
    sources: Sequence[PackSource],
    tokenizer: Any,
    folder: Path,
    tokens: int | None,
    seed: int,
    skip_bad: bool,
    advance: Callable[[int, str], None],
) -> dict[str, Any]:
    encode = Tokens(tokenizer)
    whole = sum(source.share or 0 for source in sources)
    record: dict[str, Any] = {"tokens": {}, "held_out": {}, "repeated": {}, "skipped": {}}
    writers: dict[str, ArrayWriter] = {}
    for source in sources:
        limit = _limit(source, tokens, whole, sum(record["tokens"].values()))
        if limit == 0:
            break
        writer = ArrayWriter(folder / "train" / f"{source.name}.npy", encode.dtype)
        held = ArrayWriter(folder / "held_out" / f"{source.name}.npy", encode.dtype)
        documents = _Documents(source, seed, skip_bad)
        for ids, held_out in encode.batches(documents):
            full = limit is not None and writer.count >= limit
            if full and held.count:
                break
            if held_out or not full:
                (held if held_out else writer).add(ids)
                advance(len(ids), source.name)
        if limit is not None:
            writer.resize(min(limit, writer.count))
        held.close()
        if not writer.count + held.count:
            raise ValueError(f"data: {source.path} holds no texts: none of its documents has a token")
        writers[source.name] = writer
        record["tokens"][source.name], record["held_out"][source.name] = writer.count, held.count
        record["skipped"][source.name] = documents.skipped
    _share_out(sources, writers, record, tokens, whole)
    for writer in writers.values():
        writer.close()
    return record


def _limit(source: PackSource, tokens: int | None, whole: float, have: int) -> int | None:
    """Tokens to take from a source at most: its share, or without shares what the sources before it left."""
    if tokens is None:
        return None
    limit = int(tokens * (source.share or 0) / whole) if whole else tokens - have
    if whole and not limit:
        raise ValueError(
            f"tokens: {tokens} leave none for {source.path} at its share: more tokens, or drop it"
        )
    return limit


def _share_out(
    sources: Sequence[PackSource],
    writers: dict[str, "ArrayWriter"],
    record: dict[str, Any],
    tokens: int | None,
    whole: float,
) -> None:
    """Repeat the sources that have less than their share."""
    if not whole:
        return
    total = tokens or max(writers[s.name].count * whole / (s.share or whole) for s in sources)
    for source in sources:
        writer, wanted = writers[source.name], int(total * (source.share or 0) / whole)
        once = writer.count
        writer.resize(wanted)
        record["tokens"][source.name] = writer.count
        if writer.count > once:
            record["repeated"][source.name] = writer.count / once
            logger.warning("%s is read %.1f times to reach its share", source.path, writer.count / once)


class _Documents:
    """The documents of a source once, each with whether it is held out."""

    def __init__(self, source: PackSource, seed: int, skip_bad: bool) -> None:
        self.source = source
        self.files = Files(source.path, f"{seed} {source.name}", skip_bad)

    @property
    def skipped(self) -> int:
        return self.files.skipped

    def __iter__(self) -> Iterator[tuple[TrainingDocument, bool]]:
        stream = self.files.once()
        first = list(islice(stream, _FEW))
        if len(first) == 1 and first[0].text:
            yield from _halves(first[0])
            return
        if len(first) < _FEW:
            ranked = sorted(range(len(first)), key=lambda n: _digest(first[n]))
            held = set(ranked[: max(1, len(first) // HELD_OUT)]) if len(first) > 1 else set()
            yield from ((document, n in held) for n, document in enumerate(first))
            return
        for document in (*first, *stream):
            yield document, _digest(document) % HELD_OUT == 0


def _halves(document: TrainingDocument) -> Iterator[tuple[TrainingDocument, bool]]:
    """A source of one document: its end is held out, from the last line that begins in its last part."""
    text = document.text or ""
    cut = text.rfind("\n", 0, len(text) - len(text) // HELD_OUT) + 1
    cut = cut if cut > len(text) // 2 else len(text) - len(text) // HELD_OUT
    yield TrainingDocument(document.place, text=text[:cut]), False
    yield TrainingDocument(document.place, text=text[cut:]), True


def _digest(document: TrainingDocument) -> int:
    content = document.text if document.text is not None else json.dumps([document.messages, document.ids])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


class Tokens:
    """Documents to token ids: text as it is, conversations in the tokenizer's chat template where it has one.

    `end` is the token after a document; `dtype` the narrowest that holds the vocabulary.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.vocabulary = tokenizer, len(tokenizer)
        known = tokenizer.get_added_vocab()
        self.end = known.get(_END, tokenizer.eos_token_id)
        if self.end is None:
            raise ValueError("the tokenizer has no end-of-text token to put between documents")
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)

    def _text(self, document: TrainingDocument) -> str:
        if document.text is not None:
            return document.text
        messages = document.messages or []
        if not self.tokenizer.chat_template:
            return plain(messages)
        return self.tokenizer.apply_chat_template(messages, tools=document.tools or None, tokenize=False)

    def _ids(self, document: TrainingDocument) -> list[int]:
        ids = document.ids or []
        if ids and max(ids) >= self.vocabulary:
            raise ValueError(
                f"data: {document.place}: token {max(ids)} is beyond the vocabulary of {self.vocabulary}"
            )
        return ids

    def batches(self, documents: "_Documents") -> Iterator[tuple[np.ndarray, bool]]:
        """Ids of each document with its end, and whether it is held out."""
        stream = iter(documents)
        while batch := list(islice(stream, _BATCH)):
            texts = ["" if document.ids is not None else self._text(document) for document, _ in batch]
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for (document, held_out), ids in zip(batch, encoded, strict=True):
                found = self._ids(document) if document.ids is not None else ids
                if found:
                    yield np.array([*found, self.end], dtype=self.dtype), held_out


class ArrayWriter:
    """A one-dimensional `.npy` file that grows; its header is written last."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.dtype, self.count = path, dtype, 0
        self._file = open(path, "wb+")  # noqa: SIM115 -- open until close()
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for a length of any number of digits: it is overwritten in place
        self._file.seek(0)
        kind = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, {**kind, "shape": (self.count,)})
        self._start = self._file.tell()

    def add(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self.dtype).tobytes())
        self.count += len(ids)

    def resize(self, wanted: int) -> None:
        """Cut to so many tokens, or go on from the beginning until there are as many."""
        once = self.count
        if wanted <= once:
            self.count = wanted
            self._file.truncate(self._start + wanted * self.dtype.itemsize)
            return
        self._file.flush()
        array = np.memmap(self.path, self.dtype, "r", self._start, (once,))
        while self.count < wanted:
            place = self.count % once
            self.add(array[place : place + min(once - place, wanted - self.count, _COPIED)])

    def close(self) -> None:
        self._header()
        self._file.close()
        if not self.count:
            self.path.unlink()
