"""Looking after contexts on disk without a model: list, check, fork, pack into one file, unpack, remove."""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs import write_errors
from .checks import damaged, sync_folder
from .folder import ContextFolder, is_ours, link_files
from .manifest import MANIFEST, Manifest, read_manifest
from .merge import FULL_PAGES, groups_to_merge, merge
from .segment import Counter

SUFFIX = ".ctx"  # of a context's folder, by custom
_PREFIX = "context/"  # of the names in an exported file
Progress = Callable[[int], None]  # called with a number of bytes that were done


@dataclass(frozen=True)
class Listed:
    """A context that was found, or why a folder that should be one cannot be read."""

    path: Path
    manifest: Manifest | None
    problem: str = ""


def is_context(path: str) -> bool:
    """Whether a user who names this path means a context: by its ending, or by what lies there."""
    folder = Path(path)
    if folder.suffix == SUFFIX:
        return True
    found = folder.is_dir() and (folder / MANIFEST).exists()
    return found and any(is_ours(p.name) and p.name != MANIFEST for p in folder.iterdir())


def list_contexts(folder: str | Path) -> Iterator[Listed]:
    """The contexts directly in a folder, by name; the folder itself if it is one.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for path in [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]:
        if (path / MANIFEST).is_file():
            try:
                yield Listed(path, read_manifest(path))
            except ValueError as error:
                if path.suffix == SUFFIX or path == folder or "no context" not in str(error):
                    yield Listed(path, None, str(error))


def describe(path: str | Path) -> dict[str, Any]:
    """What is known of a context, for people and programs; only its manifest is read.

    Raises:
        ValueError: it is no context, or its manifest is damaged.
    """
    manifest = read_manifest(path)
    identity = manifest.identity
    return {
        "path": str(path),
        "tokens": manifest.tokens,
        "planned_tokens": max(manifest.planned, manifest.tokens),
        "whole": manifest.is_whole,
        "attention": "sparse" if manifest.sparse else "dense",
        "bytes": manifest.num_bytes,
        "bytes_per_token": round(manifest.num_bytes / manifest.tokens, 1) if manifest.tokens else None,
        "documents": [name for text in manifest.texts for name in text.names],
        "turns": [{"question": t.question, "answer": t.answer} for t in manifest.turns],
        "segments": len(manifest.segments),
        "dtype": identity.get("dtype"),
        "kv_dtype": manifest.kv_dtype,
        "layers": identity.get("config", {}).get("num_hidden_layers"),
        "hidden_size": identity.get("config", {}).get("hidden_size"),
    }


def verify(path: str | Path, progress: Progress | None = None) -> int:
    """Read all files of a context and check every byte; returns how many there are.

    Raises:
        DamagedContext: the first file and field that is not what was written.
        ValueError: it is no context.
    """
    folder = ContextFolder.open(path)
    _verify(folder, progress or (lambda _: None))
    return folder.manifest.num_bytes + (folder.path / MANIFEST).stat().st_size


def _verify(folder: ContextFolder, progress: Progress) -> None:
    folder.texts()
    for known in folder.manifest.segments:
        file = folder.segment(known, Counter())
        try:
            for size in file.verify():
                progress(size)
        finally:
            file.close()


def compact(path: str | Path) -> tuple[int, int]:
    """Merge all small segments of a context; returns how many segments it had and has.

    Raises:
        ValueError: it is no context, damaged, in use by another process, or cannot be written; it is as it
            was.
    """
    folder = ContextFolder.open(path, write=True)
    try:
        groups = groups_to_merge(folder.manifest, FULL_PAGES, youngest=0)
        return len(folder.manifest.segments), len(merge(folder, groups).segments)
    finally:
        folder.close()


def fork(source: str | Path, target: str | Path) -> Manifest:
    """A second context that begins as the first; its files are the same ones where the disk can share them.

    Raises:
        ValueError: the source is no context, the target holds something or cannot be written.
    """
    old = ContextFolder.open(source)
    new = ContextFolder.create(target, old.manifest)
    try:
        link_files(old, new.path)
        new.put(old.manifest)
    finally:
        new.close()
    return old.manifest


def export(path: str | Path, target: str | Path, progress: Progress | None = None) -> int:
    """Pack a context into one file (an uncompressed tar); every byte is checked on the way. Returns its size.

    Raises:
        ValueError: it is no context, or damaged; the file exists or cannot be written.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} exists: give another name")
    folder = ContextFolder.open(path)
    _verify(folder, progress or (lambda _: None))
    partial = target.with_name(target.name + ".partial")
    with write_errors(target.parent, "export it again"):
        try:
            with open(partial, "wb") as file:
                with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                    for name in _file_names(folder.manifest):
                        tar.add(folder.path / name, _PREFIX + name, recursive=False, filter=_plain)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            sync_folder(target.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return target.stat().st_size


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    entry.type, entry.linkname = tarfile.REGTYPE, ""
    return entry


def _file_names(manifest: Manifest) -> list[str]:
    """The manifest first: whoever unpacks knows what is to come."""
    return [MANIFEST, *(t.file for t in manifest.texts), *(s.file for s in manifest.segments)]


def unpack(source: str | Path, target: str | Path, progress: Progress | None = None) -> Manifest:
    """Unpack a file that `export` made into a new folder; every byte is checked before it counts as a
    context.

    Raises:
        ValueError: it is no such file, truncated or damaged; the target holds something or cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise ValueError(f"{source}: no such file" if not source.exists() else f"{source}: not a file")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{target} is not empty: give a new folder")
    folder = target.with_name(target.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with write_errors(target.parent, "import it again"):
            folder.mkdir(parents=True)
            _extract(source, folder)
            _verify(ContextFolder.open(folder), progress or (lambda _: None))
            if target.exists():
                target.rmdir()
            folder.rename(target)
            sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError):
            raise type(error)(str(error).replace(str(folder), str(source))) from error
        raise
    return read_manifest(target)


def _extract(source: Path, folder: Path) -> None:
    """The files of the tar; no name that leads elsewhere, nothing that the manifest does not name."""
    try:
        with tarfile.open(source, "r|") as tar:
            first = tar.next()
            if first is None or first.name != _PREFIX + MANIFEST or not first.isreg():
                raise ValueError(f"{source}: not an exported context: its first entry must be {MANIFEST}")
            _copy(tar, first, folder / MANIFEST)
            wanted = set(_file_names(read_manifest(folder))) - {MANIFEST}
            while wanted:
                entry = tar.next()
                if entry is None:
                    raise damaged(source, "the file", f"an entry {sorted(wanted)[0]}", "its end")
                name = entry.name.removeprefix(_PREFIX)
                if name not in wanted or not entry.isreg():
                    raise damaged(source, "an entry", f"one of {sorted(wanted)[:3]}", repr(entry.name))
                wanted.remove(name)
                _copy(tar, entry, folder / name)
    except (tarfile.TarError, EOFError) as error:
        raise damaged(source, "the file", "an exported context (tar)", f"something else ({error})") from error


def _copy(tar: tarfile.TarFile, entry: tarfile.TarInfo, target: Path) -> None:
    data = tar.extractfile(entry)
    assert data is not None, "a regular file"
    with open(target, "xb") as file:
        shutil.copyfileobj(data, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def remove(path: str | Path) -> int:
    """Remove a context; returns the bytes that it named. Files of others in the folder stay.

    Raises:
        ValueError: it is no context, or another process writes to it.
    """
    folder = ContextFolder.open(path, write=True)
    size = folder.manifest.num_bytes
    try:
        with write_errors(folder.path):
            (folder.path / MANIFEST).unlink()  # first: what is half removed is no context any more
            for name in _file_names(folder.manifest)[1:]:
                (folder.path / name).unlink(missing_ok=True)
    finally:
        folder.close()
    if not any(folder.path.iterdir()):
        folder.path.rmdir()
    return size
