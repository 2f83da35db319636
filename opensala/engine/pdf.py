"""The text of a PDF, page by page, with pypdf, and what of it could not be had.

It does no OCR: a page that is only an image has no text, and is named. pypdf repairs damaged files where it
can; that it had to is said too, because a repaired file may lack text.

Run as a program (`python -P pdf.py SECONDS BYTES PARENT < FILE`) it does this in a process of its own, which
needs neither torch nor the rest of this package: for servers, whose other requests must not wait for a file
that keeps an interpreter busy for minutes, nor suffer from one that was made to take all memory.
"""

import io
import json
import logging
import os
import signal
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

from pypdf import PdfReader
from pypdf.errors import DependencyError, PyPdfError

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# What pypdf raises for damaged files is seldom its own: a missing key, a wrong type, a filter it lacks
# (NotImplementedError), a page tree that contains itself (RecursionError), broken compressed data.
_BROKEN = (
    PyPdfError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def pdf_text(data: bytes) -> tuple[str, list[str]]:
    """The text of all pages that have any, and remarks on the others.

    Raises:
        ValueError: a password is needed, the file cannot be read, or no page has text; the message is the
            reason alone.
    """
    texts: list[str] = []
    empty: list[int] = []
    failed: dict[int, str] = {}
    with _warnings() as repairs:
        reader, count = _open(data)
        for number in range(1, count + 1):
            try:
                text = _whole_characters(reader.pages[number - 1].extract_text())
            except (DependencyError, *_BROKEN) as error:
                failed[number] = _reason(error)
                continue
            if text.strip():
                texts.append(text)
            else:
                empty.append(number)
    return "\n\n".join(texts), _remarks(count, texts, empty, failed, repairs)


def _open(data: bytes) -> tuple[PdfReader, int]:
    """A reader of the file, unlocked, and its number of pages."""
    try:
        reader = PdfReader(io.BytesIO(data))
        # with an owner's password only, the user's is empty
        locked = reader.is_encrypted and not reader.decrypt("")
        count = 0 if locked else len(reader.pages)
    except DependencyError as error:
        raise ValueError(
            "a PDF encrypted with AES, which needs another package: pip install 'pypdf[crypto]', or decrypt "
            "it first, for example with qpdf --decrypt"
        ) from error
    except _BROKEN as error:
        raise ValueError(f"not a readable PDF ({_reason(error)})") from error
    if locked:
        raise ValueError("a PDF that needs a password; decrypt it first, for example with qpdf --decrypt")
    return reader, count


def _remarks(
    count: int, texts: Sequence[str], empty: Sequence[int], failed: dict[int, str], repairs: Sequence[str]
) -> list[str]:
    """What a reader of the text should know; ValueError if there is none."""
    why = f"{_pages(list(failed))} cannot be read ({next(iter(failed.values()))})" if failed else ""
    if not texts:
        raise ValueError(
            f"a PDF without text: {why}"
            if failed
            else f"a PDF without text ({count:,} pages, blank or only images); run OCR on it first"
        )
    notes = []
    if empty:
        notes.append(
            f"{_pages(empty)} of {count:,} without text (blank, or only an image: it would need OCR)"
        )
    if why:
        notes.append(f"{why}; left out")
    unknown = sum(text.count(_UNKNOWN) for text in texts)
    if unknown:
        notes.append(f"{unknown:,} characters could not be decoded and stand as {_UNKNOWN}")
    if repairs:
        notes.append(
            f"not quite a valid PDF, text may be missing (pypdf warned {len(repairs):,} times, first: "
            f"{repairs[0]})"
        )
    return notes


def _pages(numbers: Sequence[int]) -> str:
    """`page 3` or `pages 3, 5-7`."""
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    runs = [numbers[a:b] for a, b in pairwise([0, *breaks, len(numbers)])]
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"page{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


def _reason(error: BaseException) -> str:
    return _one_line(f"{type(error).__name__}: {error}").rstrip(": ")


def _one_line(text: str) -> str:
    return " ".join(_whole_characters(text).split())[:200]


def _whole_characters(text: str) -> str:
    """Halves of characters, which fonts with broken tables give, joined where both are there; what stands for
    no character replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", _UNKNOWN)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(_one_line(record.getMessage()))


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What pypdf logs while the block runs."""
    logger, collector = logging.getLogger("pypdf"), _Collector()
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)


def main() -> int:
    """Read a PDF from standard input; write `{"text", "notes"}`, or `{"error"}`, as JSON to standard output.

    The command line says how many seconds of a processor and bytes of memory it may take, and the id of the
    process that wants the answer. Beyond the first the process is ended by SIGXCPU; too little memory is an
    error like others. On Linux it ends when its parent does, however that ends.
    """
    import resource  # not on every system that reads documents

    seconds, size, parent = (int(word) for word in sys.argv[1:4])
    if not _ends_with(parent):
        return 0  # nobody waits for an answer
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    os.nice(5)  # whoever waits for a token comes first
    try:
        answer = _answer(sys.stdin.buffer.read())
    except MemoryError:
        answer = json.dumps({"error": f"a PDF that takes more than {size:,} bytes of memory to read"})
    sys.stdout.buffer.write(answer.encode())
    return 0


def _answer(data: bytes) -> str:
    try:
        text, notes = pdf_text(data)
    except ValueError as error:
        return json.dumps({"error": str(error)})
    return json.dumps({"text": text, "notes": notes})


def _ends_with(parent: int) -> bool:
    """Be killed when the parent ends; False if it has ended already. A parent that is killed cannot end what
    it started, and closed pipes are noticed only once there is something to write."""
    if sys.platform == "linux":
        import ctypes

        death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        with suppress(OSError, AttributeError):  # a C library that cannot be had: the other bounds hold
            ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main())
