"""Checksums, whole files and the errors of damaged ones: what everything on a context's disk goes through.

It knows files and bytes only.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

SUM_BYTES = 16


class DamagedContext(ValueError):
    """A file of a context is not what was written: truncated, changed, or gone.

    Attributes:
        path: that file.
    """

    path: Path | None = None


def checksum(*parts: bytes | bytearray | memoryview) -> bytes:
    """XXH3 of the parts, one behind the other, in 16 bytes.

    It finds damage, seven times as fast as a cryptographic hash (BLAKE2b), which would find no more of it:
    whoever can change a file on purpose can change what is noted of it as well.
    """
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


def damaged(path: Path, field: str, expected: str, found: str) -> DamagedContext:
    """The error that names file, field, what was expected and what is there."""
    error = DamagedContext(
        f"{path}: {field} is damaged: expected {expected}, found {found}; restore the context from a copy, "
        "or ingest its documents again"
    )
    error.path = path
    return error


def seal(record: Mapping[str, Any]) -> bytes:
    """A record as JSON, with a checksum of all of it in the last line."""
    lines = json.dumps(record, indent=1, ensure_ascii=True)
    return f'{lines[:-2]},\n "checksum": "{checksum(lines.encode()).hex()}"\n}}\n'.encode()


def write_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file beside its place, flush it to disk, put it there, and flush the folder's entry too.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk is not kept full
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_file`, of bytes that are at hand."""

    def write(file: IO[bytes]) -> None:
        file.write(data)

    write_file(path, write)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
