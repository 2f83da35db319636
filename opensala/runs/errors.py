"""A disk that is full or cannot be written, as one line for the user."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO)


@contextmanager
def write_errors(folder: Path, advice: str = "") -> Iterator[None]:
    """Turn what the system says about a file that cannot be written in `folder` into a ValueError.

    Args:
        advice: what to do once there is room again.
    """
    try:
        yield
    except SafetensorError as error:  # its writer hands the system's words on, but not the number
        raise ValueError(_line(folder, folder, str(error), advice)) from error
    except OSError as error:
        if error.errno not in (*_FULL, *_REFUSED):
            raise
        where = Path(error.filename) if isinstance(error.filename, str) else folder
        if error.errno in _FULL:
            raise ValueError(_line(folder, where, error.strerror, advice)) from error
        raise ValueError(
            f"{where} cannot be written: {error.strerror}; give a folder that this user may write to"
        ) from error


def _line(folder: Path, where: Path, reason: str | None, advice: str) -> str:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    return (
        f"{where} cannot be written: {reason}; {free:,} bytes are free there. What was saved before is "
        f"unharmed: free some space{f', then {advice}' if advice else ''}"
    )
