"""The seconds in which the `opensala` command imports its packages: Ctrl-C ends them with one line and exit
code 130, as it does later, and what other packages have to say about themselves is not shown.

A program that imports this package is left alone: its Ctrl-C and its warnings are its own. One thing is for
both: torch takes memory for tensors of 2 MiB and more in huge pages, unless the variable says otherwise.
"""

import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType


def is_command() -> bool:
    """Whether this process is the `opensala` command, or `python -m opensala`."""
    called = getattr(sys, "argv", [""])[:1]
    if called == ["-m"]:  # as long as the module is being looked for, which imports its package
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return after[:1] == ["opensala"]
    return bool(called) and Path(called[0]).stem == "opensala"


def prepare() -> None:
    """Take over Ctrl-C until `cli.main` does, and silence warnings that were not asked for with -W."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch when it is imported
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Leave at once: an exception in the middle of an import may be swallowed, or end in a traceback."""
    os.write(2, b"opensala: interrupted\n")
    os._exit(128 + number)


# Reading a prompt takes and gives back large tensors all the time, and each page of 4 KiB among them is a
# fault (docs/speed.md). Torch reads this at its first tensor of that size.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if is_command():
    prepare()
