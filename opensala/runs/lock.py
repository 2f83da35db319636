"""One process at a time in an output folder.

The lock is the kernel's (flock), so that it goes when its process ends, however that ends; the file only says
who holds it. Network file systems that have no such locks are used without one, which is said in the log.
"""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from .errors import write_errors

logger = logging.getLogger("opensala")
LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class FolderLock:
    """Hold a folder, which is made if need be, until `release`.

    Raises:
        ValueError: another process holds it (named), the path is a file, or it cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handle: int | None = None
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder")
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._handle = self._acquire()
        self._made: Sequence[Path] = missing

    def _acquire(self) -> int:
        path = self.folder / LOCK_FILE
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
                os.close(handle)
                raise ValueError(
                    f"{self.folder} is in use by {holder}: wait for it to end, or give another folder"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    raise
                logger.warning("%s has no file locks: start no second run in %s", path, self.folder)
            if _is_at(handle, path):
                break
            os.close(handle)  # whoever held it removed it in the meantime: another file has its name now
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return handle

    def release(self) -> None:
        """Let the folder go, without a trace: the lock's file, and the folders made for it that are empty."""
        if self._handle is None:
            return
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None
        for made in self._made:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
