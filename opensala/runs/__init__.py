"""What every run that writes a folder needs: the folder itself, its lock, one line for a disk that cannot be
written, progress bars, and steps that are processes of their own. It knows nothing of models, of what is
trained or of what is measured."""

from .errors import write_errors
from .folder import RunFolder, read_json, write_json
from .lock import FolderLock
from .progress import progress_bar, require_matplotlib
from .steps import Ended, done_before, mark_done, package_command, run_process

__all__ = [
    "Ended",
    "FolderLock",
    "RunFolder",
    "done_before",
    "mark_done",
    "package_command",
    "progress_bar",
    "read_json",
    "require_matplotlib",
    "run_process",
    "write_errors",
    "write_json",
]
