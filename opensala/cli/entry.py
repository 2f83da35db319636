"""Running the command line as a program: its streams, its exit codes, and what of other packages is shown.

Bad input ends with one line and exit code 2; output that is lost, or a file that cannot be read or written,
with one line and exit code 1; Ctrl-C with exit code 130. Warnings of other packages are about their callers'
code, not about the user's documents, and are not shown; ours are, as notes.
"""

import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings

import typer
from huggingface_hub.utils import enable_progress_bars
from transformers.utils.logging import disable_progress_bar

from .commands import app

INTERRUPTED = 128 + signal.SIGINT  # as shells report it
PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows lacks
_TALKATIVE = ("transformers", "huggingface_hub", "torch")  # these bring a handler of their own to stderr


class _Notes(logging.Handler):
    """Writes our warnings to what stderr is at the time: while a progress bar is shown, that is the bar. An
    exception that goes with one, a defect for a server's log, follows with its traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"note: {' '.join(record.getMessage().split())}", file=sys.stderr)
        if record.exc_info and record.exc_info[1] is not None:
            traceback.print_exception(record.exc_info[1], file=sys.stderr)


def main() -> None:
    """Run the command line and leave with its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _quieten_others()
    if sys.stderr is None:  # closed by the caller: print() would send notes to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- for as long as the process lives
    if sys.stdout is None:
        sys.exit(_fail("standard output is closed, an answer would be lost", 1))
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has had enough
        code = PIPE_CLOSED
        _drop_output()
    except OSError as error:
        if code == 0:
            why = f"standard output cannot be written ({error.strerror})"
            code = _fail(f"{why}; what was to be there is lost", 1)
        _drop_output()
    sys.exit(code)


def _run() -> int:
    try:
        code = app(standalone_mode=False) or 0
        # typer turns Ctrl-C inside a command into this code, without a word
        return _fail("interrupted", code) if code == INTERRUPTED else code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except ValueError as error:
        return _fail(str(error), 2)
    except typer.TyperException as error:  # usage errors: unknown options, missing arguments
        return _fail(error.format_message(), 2)
    except MemoryError:
        return _fail("out of memory: shorten the document or use a smaller --dtype", 2)
    except (
        SystemExit
    ) as stop:  # a demonstration that failed; a reader that went away, which typer turns into 1
        return stop.code if isinstance(stop.code, int) else 1
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{place}reading or writing failed ({error.strerror or error})", 1)


def _quieten_others() -> None:
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    disable_progress_bar()  # of loading weights, which is soon done, and of downloads, which are not
    enable_progress_bars()
    if not logging.getLogger().handlers:  # without any, what nobody handles is printed
        logging.getLogger().addHandler(logging.NullHandler())
    ours = logging.getLogger("opensala")
    ours.setLevel(logging.WARNING)
    if not any(isinstance(handler, _Notes) for handler in ours.handlers):
        ours.addHandler(_Notes())


def _drop_output() -> None:
    """Let the interpreter's own flush at exit go nowhere: it would complain a second time."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor has nothing to flush there
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be what is full or closed
        print(f"opensala: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
