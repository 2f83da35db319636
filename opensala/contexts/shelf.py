"""Contexts under ids, each belonging to an owner, in one folder: what a server keeps for its clients.

    DIR/ctx_ID/       the context, as `folder` writes it; it never changes
    DIR/ctx_ID.json   its record: owner, model, size, how long it is kept

The record is written last and removed first: without one, a context is not there. Several servers may share
the folder. It knows files only, no engine.
"""

import json
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..runs import FolderLock, write_errors
from .checks import write_bytes
from .folder import ContextFolder, link_files

_log = logging.getLogger("opensala.server")
_ID = re.compile("ctx_[0-9a-f]{32}")


@dataclass(frozen=True)
class Record:
    """What is known of a context.

    Attributes:
        id: `ctx_` and 128 random bits.
        owner: the id of the key that it belongs to; "" on a server without keys.
        model: what clients called the model that read it.
        fingerprint: of that model's identity.
        tokens: of its documents.
        bytes: on disk, files shared with other contexts included.
        documents: their names.
        created: seconds since 1970.
        ttl: seconds that it is kept from `renewed` on; None for as long as nobody deletes it.
        renewed: when `ttl` was set.
        pinned: it is kept whatever its ttl.
        parent: the context that it was extended or forked from.
    """

    id: str
    owner: str
    model: str
    fingerprint: str
    tokens: int
    bytes: int
    documents: list[str]
    created: int
    ttl: int | None
    renewed: int
    pinned: bool = False
    parent: str | None = None

    @property
    def expires(self) -> int | None:
        """When it goes, in seconds since 1970; None for never."""
        return None if self.pinned or self.ttl is None else self.renewed + self.ttl


class Shelf:
    """The contexts in a folder, which is made if need be.

    Args:
        root: the folder.
        clock: seconds since 1970.

    Raises:
        ValueError: it is a file, or cannot be written.
    """

    def __init__(self, root: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.root, self.clock = Path(root), clock
        self._records = threading.Lock()  # a record that changes is read and written as one
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{root} is a file: give a folder for contexts")
        with write_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{secrets.token_hex(4)}"
            probe.touch(mode=0o600)
            probe.unlink()

    @staticmethod
    def new_id() -> str:
        return f"ctx_{secrets.token_hex(16)}"

    def folder(self, context_id: str) -> Path:
        """Where a context lies. Only for ids that `new_id` may have made."""
        assert _ID.fullmatch(context_id), "no name of a client's becomes a path"
        return self.root / context_id

    def get(self, context_id: str, owner: str) -> Record | None:
        """A context of an owner; None if there is none of this id, if it has expired, or is another's."""
        if not _ID.fullmatch(context_id):
            return None
        record = self._read(self._record_path(context_id))
        if record is None or record.owner != owner or self._is_over(record):
            return None
        return record

    def has(self, context_id: str) -> bool:
        """Whether there is a context of this id, whoever's it is."""
        return self._read(self._record_path(context_id)) is not None

    def records(self, owner: str) -> list[Record]:
        """All contexts of an owner, the oldest first."""
        mine = (r for r in self._all() if r.owner == owner and not self._is_over(r))
        return sorted(mine, key=lambda record: (record.created, record.id))

    def put(self, record: Record) -> None:
        """Write a record, or replace it.

        Raises:
            ValueError: it cannot be written; what was there is as it was.
        """
        with write_errors(self.root):
            write_bytes(self._record_path(record.id), json.dumps(asdict(record)).encode())

    def change(self, context_id: str, owner: str, fields: dict[str, Any]) -> Record | None:
        """Set fields of a record; a `ttl` counts from now on. Returns what it is then; None if there is no
        such context (any more).

        Raises:
            ValueError: it cannot be written; what was there is as it was.
        """
        with self._records:
            record = self.get(context_id, owner)
            if record is None:
                return None
            renewed = int(self.clock()) if "ttl" in fields else record.renewed
            changed = replace(record, renewed=renewed, **fields)
            self.put(changed)
        return changed

    def fork(self, source: str, record: Record) -> None:
        """A second context, of this record, with the files of another one.

        Raises:
            ValueError: they are not there, or cannot be written; nothing is left of it.
        """
        old = ContextFolder.open(self.folder(source))
        new = ContextFolder.create(self.folder(record.id), old.manifest)
        try:
            link_files(old, new.path)
            new.put(old.manifest)
            self.put(record)  # before the lock is given up: until then a sweep lets it be
        except BaseException:
            self.remove(record.id)
            raise
        finally:
            new.close()

    def remove(self, context_id: str) -> None:
        """Remove a context; whoever has its files open can read on. Twice is no harm."""
        folder = self.folder(context_id)
        with self._records:
            self._record_path(context_id).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> int:
        """Remove what has expired, and what was begun and never finished by a process that is gone; returns
        how many contexts that were."""
        gone = [path.stem for path in self._paths() if self._is_gone(path)]
        for context_id in gone:
            self.remove(context_id)
        return len(gone) + sum(self._remove_unfinished(path) for path in self.root.glob("ctx_*"))

    def _remove_unfinished(self, folder: Path) -> bool:
        if not _ID.fullmatch(folder.name) or not folder.is_dir() or self._record_path(folder.name).exists():
            return False
        try:
            lock = FolderLock(folder)
        except ValueError:  # it is being written
            return False
        try:
            unfinished = not self._record_path(folder.name).exists()  # not finished in the meantime
            if unfinished:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.release()
        return unfinished

    def _record_path(self, context_id: str) -> Path:
        return self.folder(context_id).with_suffix(".json")

    def _is_over(self, record: Record) -> bool:
        return record.expires is not None and record.expires <= self.clock()

    def _is_gone(self, path: Path) -> bool:
        """Whether the context of a record has expired, or its files are not there: two servers of one folder
        changed and removed it at the same moment."""
        if not path.with_suffix("").is_dir():
            return True
        record = self._read(path)
        return record is not None and self._is_over(record)

    def _paths(self) -> Iterator[Path]:
        return (path for path in self.root.glob("ctx_*.json") if _ID.fullmatch(path.stem))

    def _all(self) -> Iterator[Record]:
        return (record for record in map(self._read, self._paths()) if record is not None)

    def _read(self, path: Path) -> Record | None:
        if not path.with_suffix("").is_dir():
            return None
        try:
            record = Record(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s is no record of a context and is passed over: %s", path, error)
            return None
        return record if record.id == path.stem else None
