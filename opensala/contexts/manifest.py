"""The manifest of a context: what it is of, and which segments it consists of. It is replaced last.

It guards itself: the file is exactly what `Manifest.text` writes, with a checksum of the rest in its last
line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .checks import DamagedContext, damaged, seal, write_bytes
from .segment import Written

FORMAT = "opensala-context"
VERSION = 2  # 1 had BLAKE2b sums
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TextFile:
    """A file with documents' texts: its name, size and checksum, and the documents' names."""

    file: str
    size: int
    checksum: str
    names: list[str]


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `begin` and `end` are the numbers of tokens before and behind them."""

    question: str
    answer: str
    begin: int
    end: int


@dataclass(frozen=True)
class Manifest:
    """What a context is.

    Attributes:
        identity: the model it was made with (see `identity`).
        page_size: tokens per page.
        sparse: whether its tokens were read sparsely.
        segments: in order.
        texts: files with the documents.
        turns: what was asked since.
        planned: tokens that it is to have when it is whole; more than it has if reading was interrupted.
        tail: the end of the documents' text, to join a question to.
        tail_tokens: tokens of that end.
        document_tokens: tokens of the documents (the turns come behind them).
    """

    identity: dict[str, Any]
    page_size: int
    sparse: bool
    segments: list[Written] = field(default_factory=list)
    texts: list[TextFile] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    planned: int = 0
    tail: str = ""
    tail_tokens: int = 0
    document_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.segments[-1].end_token if self.segments else 0

    @property
    def is_whole(self) -> bool:
        return self.tokens >= self.planned

    @property
    def num_bytes(self) -> int:
        return sum(s.size for s in self.segments) + sum(t.size for t in self.texts)

    @property
    def kv_dtype(self) -> str:
        """In what its keys and values are kept."""
        return str(self.identity.get("kv_dtype", self.identity.get("dtype")))

    def page_sources(self) -> list[tuple[int, int]]:
        """See `page_sources`."""
        return page_sources(self.segments)

    def upto(self, tokens: int) -> "Manifest":
        """The same context with only the segments of its first so many tokens, which end at a snapshot."""
        kept = [s for s in self.segments if s.end_token <= tokens]
        while kept and not kept[-1].state:
            kept.pop()
        return replace(self, segments=kept)

    def text(self) -> bytes:
        """What the file holds."""
        lists = {n: [vars(x) for x in getattr(self, n)] for n in ("segments", "texts", "turns")}
        return seal({"format": FORMAT, "version": VERSION, **vars(self), **lists})

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest by this one."""
        write_bytes(folder / MANIFEST, self.text())


def page_sources(segments: Sequence[Written]) -> list[tuple[int, int]]:
    """For each page of segments that follow one another: the last segment that holds it, and which of its
    pages it is there."""
    sources: list[tuple[int, int]] = []
    for number, segment in enumerate(segments):
        del sources[segment.first_page - segments[0].first_page :]
        sources += [(number, i) for i in range(segment.pages)]
    return sources


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a context.

    Raises:
        ValueError: the folder holds no context, one of another format or version, or a damaged one.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.exists():
        raise ValueError(
            f"{folder}: there is no such context: make one with opensala ingest DOC... -o {folder}"
        )
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: a file, no context, which is a folder; a file that was exported is opened by "
            "opensala contexts import"
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{folder}: no context: it has no {MANIFEST}") from None
    except OSError as error:
        raise ValueError(f"{path}: the manifest cannot be read: {error.strerror or error}") from error
    try:
        record = json.loads(data)
    except ValueError as error:
        raise damaged(path, "the manifest", "JSON", f"something else ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}: format must be {FORMAT!r}, got {found!r}: this is no context")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{path}: version must be {VERSION}, got {record.get('version')!r}: this program reads contexts "
            f"of format version {VERSION} only; ingest the documents again"
        )
    return _checked(path, data, record)


def _checked(path: Path, data: bytes, record: dict[str, Any]) -> Manifest:
    kept = {f.name: record.get(f.name) for f in fields(Manifest)}
    try:
        kept["segments"] = [Written(**s) for s in record["segments"]]
        kept["texts"] = [TextFile(**t) for t in record["texts"]]
        kept["turns"] = [Turn(**t) for t in record["turns"]]
        manifest = Manifest(**kept)  # type: ignore[arg-type]  # checked by what it writes
        same = manifest.text() == data
        if same:
            _check_order(path, manifest)
    except (KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise damaged(path, "the manifest", "the fields of a context", f"others ({error})") from error
    if not same:
        raise damaged(path, "the manifest", "the text that its checksum is of", "another one")
    return manifest


def _check_order(path: Path, manifest: Manifest) -> None:
    end = 0
    for segment in manifest.segments:
        pages = -(-segment.end_token // manifest.page_size) - end // manifest.page_size
        wanted = (end, end // manifest.page_size, pages)
        found = (segment.first_token, segment.first_page, segment.pages)
        if segment.end_token <= end or found != wanted:
            raise damaged(
                path, f"segment {segment.file}", f"first token, page and pages {wanted}", f"{found}"
            )
        if Path(segment.file).name != segment.file or not segment.file:
            raise damaged(path, "a segment's name", "a file in this folder", repr(segment.file))
        end = segment.end_token
    if manifest.segments and not manifest.segments[-1].state:
        raise damaged(path, "the last segment", "states behind its last token", "none")
    for text in manifest.texts:
        if Path(text.file).name != text.file:
            raise damaged(path, "a text's name", "a file in this folder", repr(text.file))


__all__ = ["MANIFEST", "DamagedContext", "Manifest", "TextFile", "Turn", "page_sources", "read_manifest"]
