"""The folder of a context: its manifest, segments and texts, read and written. It knows no engine.

Segments and texts are never changed; a manifest that names others takes the place of the old one, and only
then are files removed that no manifest names.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..engine.documents import Document
from ..runs import FolderLock, write_errors
from ..runs.lock import LOCK_FILE
from .checks import checksum, damaged, write_bytes
from .manifest import MANIFEST, Manifest, TextFile, read_manifest
from .segment import Counter, Part, SegmentFile, Written, write_segment

ADVICE = "save the context again"


class ContextFolder:
    """A context's folder, open for reading, or with `lock` for writing.

    Raises:
        ValueError: it holds no context, or a damaged one; another process writes to it.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: FolderLock | None) -> None:
        self.path, self.manifest, self.lock = path, manifest, lock

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> "ContextFolder":
        path = Path(path)
        manifest = read_manifest(path)
        if not write:
            return cls(path, manifest, None)
        lock = FolderLock(path)
        try:
            folder = cls(path, read_manifest(path), lock)
            folder.tidy()
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> "ContextFolder":
        """A new folder, locked; nothing is in it before the first `put`.

        Raises:
            ValueError: the path holds something.
        """
        path = Path(path)
        lock = FolderLock(path)
        try:
            others = [p.name for p in path.iterdir() if p.name != LOCK_FILE]
            if any(not is_ours(name) or name == MANIFEST for name in others):
                raise ValueError(f"{path} is not empty: give a new folder")
            folder = cls(path, manifest, lock)
            folder.tidy()  # what a process left that ended before its first manifest
        except BaseException:
            lock.release()
            raise
        return folder

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def tidy(self) -> None:
        """Remove files of ours that the manifest does not name."""
        named = {MANIFEST, *(s.file for s in self.manifest.segments), *(t.file for t in self.manifest.texts)}
        for path in self.path.iterdir():
            if path.name not in named and is_ours(path.name):
                path.unlink(missing_ok=True)

    # --- writing ---

    def put(self, manifest: Manifest) -> None:
        """Replace the manifest; files that only the old one names are removed.

        Raises:
            ValueError: it cannot be written; the old one stays.
        """
        assert self.lock is not None, "only a locked folder is written to"
        with write_errors(self.path, ADVICE):
            manifest.write(self.path)
        self.manifest = manifest
        self.tidy()

    def add_segment(
        self,
        tokens: np.ndarray,
        parts: Mapping[int, Part],
        states: Mapping[int, Tensor],
        first_token: int,
        first_page: int,
    ) -> Written:
        """Write a segment under a new name; it counts once a manifest names it."""
        path = self._new_name("segment", "safetensors")
        with write_errors(self.path, ADVICE):
            return write_segment(path, tokens, parts, states, first_token=first_token, first_page=first_page)

    def add_texts(self, documents: list[Document]) -> TextFile:
        """Write documents under a new name, likewise."""
        path = self._new_name("text", "json")
        data = json.dumps([[d.name, d.text] for d in documents]).encode()
        with write_errors(self.path, ADVICE):
            write_bytes(path, data)
        return TextFile(path.name, len(data), checksum(data).hex(), [d.name for d in documents])

    def _new_name(self, kind: str, ending: str) -> Path:
        taken = {p.name.split(".")[0] for p in self.path.iterdir()}
        number = next(n for n in range(1, 1 << 40) if f"{kind}-{n:05}" not in taken)
        return self.path / f"{kind}-{number:05}.{ending}"

    # --- reading ---

    def segment(self, known: Written, counter: Counter | None = None) -> SegmentFile:
        return SegmentFile(self.path / known.file, known, counter)

    def texts(self) -> list[list[Document]]:
        """The documents, batch by batch.

        Raises:
            DamagedContext: a file is not what was written.
        """
        return [self._text(known) for known in self.manifest.texts]

    def _text(self, known: TextFile) -> list[Document]:
        path = self.path / known.file
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise damaged(path, "the text", f"a file of {known.size:,} bytes", "none") from None
        except OSError as error:
            raise damaged(path, "the text", "a readable file", error.strerror or str(error)) from error
        if len(data) != known.size:
            raise damaged(path, "the length", f"{known.size:,} bytes", f"{len(data):,}")
        found = checksum(data).hex()
        if found != known.checksum:
            raise damaged(path, "the text", f"checksum {known.checksum}", found)
        return [Document(name, text) for name, text in json.loads(data)]


def link_files(source: ContextFolder, target: Path) -> None:
    """Put the files of a context into another folder too: linked where the disk allows, else copied.

    Raises:
        ValueError: they cannot be written there, or one is missing.
    """
    entries: list[Written | TextFile] = [*source.manifest.segments, *source.manifest.texts]
    for entry in entries:
        old, new = source.path / entry.file, target / entry.file
        if not old.exists():
            raise damaged(old, "the file", f"{entry.size:,} bytes", "none")
        with write_errors(target, "fork it again"):
            try:
                new.hardlink_to(old)
            except OSError:  # another disk, or one without links
                shutil.copyfile(old, new)


def is_ours(name: str) -> bool:
    """Whether a file of this name is one that contexts consist of."""
    stem = name.removesuffix(".partial")
    return stem == MANIFEST or (
        stem.startswith(("segment-", "text-")) and stem.endswith((".safetensors", ".json"))
    )


def fresh(identity: dict[str, Any], page_size: int, sparse: bool) -> Manifest:
    """The manifest of a context without tokens."""
    return Manifest(identity, page_size, sparse)


__all__ = ["ContextFolder", "fresh", "link_files"]
