"""What every run that writes a folder needs: the folder itself, its lock, one line for a disk that cannot be
written, and progress bars. It knows nothing of models, of what is trained or of what is measured."""

from .errors import write_errors
from .folder import RunFolder, read_json, write_json
from .lock import FolderLock
from .progress import progress_bar, require_matplotlib

__all__ = [
    "FolderLock",
    "RunFolder",
    "progress_bar",
    "read_json",
    "require_matplotlib",
    "write_errors",
    "write_json",
]
