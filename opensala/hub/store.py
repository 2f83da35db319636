"""Where pulled models lie, and how one gets there whole or not at all.

A folder `NAME` below the models' folder is a finished checkpoint: it is built beside under another name and
renamed at the end. What a broken-off pull left is removed by the next one.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runs.lock import FolderLock
from .catalog import CATALOG, DELTAS

_PARTIAL = ".partial-"
_CHUNK = 1 << 20


def models_folder() -> Path:
    """`$OPENSALA_HOME/models`, or `opensala/models` in the user's cache folder."""
    home = os.environ.get("OPENSALA_HOME")
    if home:
        return Path(home) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensala" / "models"


def checkpoint_folder(name: str | Path) -> Path | str:
    """The folder of a checkpoint: of a pulled model by its name, of a GGUF file as it was unpacked; anything
    else is returned as it is.

    A folder of that name here comes before a pulled model.

    Raises:
        ValueError: a known model that was not pulled, or a GGUF file that cannot be read.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return unpacked(path)
    if (str(name) in CATALOG or str(name) in DELTAS) and not path.exists():
        folder = models_folder() / str(name)
        if not (folder / "config.json").is_file():
            raise ValueError(f"the model {name} is not on this machine yet: opensala pull {name}")
        return folder
    return name


def unpacked(path: Path) -> Path:
    """The checkpoint folder of a GGUF file, made once for each content."""
    from .gguf import unpack

    folder = models_folder().parent / "gguf" / f"{path.stem}-{sha256_of(path)[:12]}"
    if not (folder / "config.json").is_file():
        with building(folder, 6 * path.stat().st_size) as partial:
            unpack(path, partial)
    return folder


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def building(folder: Path, needed: int) -> Iterator[Path]:
    """A folder to build in, which becomes `folder` when the block ends, and is gone if it fails.

    Args:
        needed: bytes that the work takes on the disk at most.

    Raises:
        ValueError: too little space, a folder that cannot be written, or another process at the same work.
    """
    partial = folder.with_name(f".{folder.name}{_PARTIAL}{os.getpid()}")
    lock = FolderLock(folder.with_name(f".{folder.name}.lock"))
    try:
        for left in folder.parent.glob(f".{folder.name}{_PARTIAL}*"):  # the lock is ours: nobody builds there
            shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise ValueError(
                f"{folder.parent} has {free / 1e9:.1f} GB free, {folder.name} needs {needed / 1e9:.1f} GB: "
                "make room, or set OPENSALA_HOME to a folder on another disk"
            )
        try:
            partial.mkdir(parents=True)
            yield partial
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(f"{folder.parent} is full: nothing was installed") from error
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
