"""Reading what users point at: files, pipes, directories and standard input.

Nothing is left out without a word: what a directory holds and is not read, and what is missing of a file, is
part of the result. It knows nothing of tokens or models.
"""

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .decode import read_text

STDIN = "-"
_TOOL_FOLDERS = {"__pycache__", "node_modules", "venv"}


@dataclass(frozen=True)
class Document:
    """A name to show and the text read under it."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """An entry of a directory that was not read, and why."""

    name: str
    reason: str


@dataclass
class Reading:
    """What was read; what directories hold beside it; remarks on what is missing of the documents."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, notes: list[str]) -> None:
        self.documents.append(Document(name, text))
        self.notes += [f"{name}: {note}" for note in notes]


def read_documents(sources: list[str]) -> Reading:
    """Read files and pipes, directories (all their text files, in order of name) and `-` (standard input).

    In a directory, hidden entries, folders of tools, links to folders (which may go round in circles) and
    files without text are passed over and listed.

    Raises:
        ValueError: a source that does not exist, is empty, or cannot be decoded; a directory without text.
    """
    if not sources:
        raise ValueError("no document given: name a file, a directory, or - for standard input")
    if sources.count(STDIN) > 1:
        raise ValueError("- is given twice, but standard input can be read only once")
    reading = Reading()
    for source in sources:
        if not source:
            raise ValueError("a document's name is empty: name a file, a directory (. for this one), or -")
        name = "standard input" if source == STDIN else shown(Path(source))
        try:
            if source == STDIN:
                reading.add(name, *_read_stdin())
            elif _is_folder(source):
                _read_folder(Path(source), reading)
            else:
                reading.add(name, *_read_file(source))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {_reason(error)}") from error
    return reading


def join_documents(documents: list[Document]) -> str:
    """One text; with several documents, each under a line with its name."""
    if len(documents) == 1:
        return documents[0].text
    return "\n\n".join(f"=== {d.name} ===\n{d.text}" for d in documents)


def shown(path: str | Path) -> str:
    """A path as one line of valid text: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or directory"
    return f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)


def _is_folder(source: str) -> bool:
    mode = os.stat(source).st_mode
    if stat.S_ISBLK(mode):
        raise ValueError("a block device, not a document")
    return stat.S_ISDIR(mode)


def _read_file(path: str | Path) -> tuple[str, list[str]]:
    with open(path, "rb") as file:
        return read_text(file)


def _read_stdin() -> tuple[str, list[str]]:
    if sys.stdin is None:
        raise ValueError("it is closed")
    return read_text(sys.stdin.buffer)


def _read_folder(folder: Path, reading: Reading) -> None:
    found, skipped = len(reading.documents), len(reading.skipped)
    for path, reason in _walk(folder):
        if not reason:
            try:
                reading.add(shown(path), *_read_file(path))
            except (OSError, ValueError) as error:
                reason = _reason(error)
        if reason:
            reading.skipped.append(Skipped(shown(path), reason))
    if len(reading.documents) > found:
        return
    left = reading.skipped[skipped:]
    why = f" ({len(left):,} skipped, first: {left[0].name}: {left[0].reason})" if left else ""
    raise ValueError(f"no text files in this directory{why}")


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """What is below a folder, in order of name: each file with "", each other entry with why it is passed
    over. Without recursion: folders may be nested deeper than Python's stack.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    pending = _entries(folder)
    while pending:
        path, is_folder, passed_over = pending.pop()
        if passed_over or not is_folder:
            yield path, passed_over
            continue
        try:
            pending += _entries(path)
        except OSError as error:
            yield path, _reason(error)


def _entries(folder: Path) -> list[tuple[Path, bool, str]]:
    """Path, whether it is a folder, and why it is passed over, last name first."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name, reverse=True)
    return [
        (folder / entry.name, entry.is_dir(follow_symlinks=False), _passed_over(entry)) for entry in entries
    ]


def _passed_over(entry: "os.DirEntry[str]") -> str:
    """Why an entry of a folder is not read; empty if it is."""
    if entry.name.startswith("."):
        return "hidden (its name begins with a dot)"
    try:
        if entry.is_dir():
            if entry.is_symlink():
                return "a link to a directory, not followed"
            return "a folder of tools" if entry.name in _TOOL_FOLDERS else ""
        if entry.is_file():
            return ""
    except OSError as error:  # a link that leads to itself, or through a folder without permission
        return _reason(error)
    return "a link to nothing" if entry.is_symlink() else "a pipe, socket or device"
