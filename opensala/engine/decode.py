"""From the bytes of a document to its text: UTF-8, UTF-16 and UTF-32 with a byte order mark, and PDF.

Other encodings are refused, not guessed: a wrong guess gives wrong letters without a word. Reasons name no
file; the caller knows which one it is.
"""

import codecs
import re
from typing import BinaryIO

_HEADER = b"%PDF-"
_HEADER_WITHIN = 1024  # bytes; readers of PDF accept the header after this much of something else
_FIRST_PIECE = 1 << 20  # bytes looked at before the rest is read: an endless device must end here
_MARKS = (  # UTF-32 before UTF-16: its little-endian mark begins with the other one's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = "looks like a binary file (it holds zero bytes); only text and PDF are read"
_SURROGATES = re.compile("[\ud800-\udfff]")


def read_text(stream: BinaryIO) -> tuple[str, list[str]]:
    """The text of a whole stream, and remarks on what of it is missing.

    Raises:
        ValueError: nothing in it, or not text; the message is the reason alone.
        OSError: the stream cannot be read.
    """
    found = text_or_pdf(stream)
    if isinstance(found, str):
        return found, []
    from .pdf import pdf_text  # pypdf takes half a second to import

    return pdf_text(found)


def text_or_pdf(stream: BinaryIO) -> str | bytes:
    """The text of a whole stream, or the bytes of the PDF that it is.

    Raises:
        ValueError: see `read_text`.
        OSError: the stream cannot be read.
    """
    data = stream.read(_FIRST_PIECE)
    if _HEADER not in data and _encoding(data) is None and b"\0" in data:
        raise ValueError(_BINARY)
    data += stream.read()
    start = _find_pdf(data)
    if start is not None:
        return data[start:]
    text = _decode(data)
    if not text.strip():
        raise ValueError("empty (no text in it)")
    return text


def check_text(name: str, text: str) -> None:
    """Refuse text that a tokenizer cannot take; `name` says in the message what it is.

    Raises:
        ValueError: no text, or bytes in it that were not UTF-8 (Python keeps them as lone surrogates).
    """
    if not text:
        raise ValueError(f"{name} is empty")
    stray = _SURROGATES.search(text)
    if stray:
        raise ValueError(
            f"{name} is not valid UTF-8 (character {stray.start() + 1:,}); set the terminal or the program "
            "that wrote it to UTF-8"
        )


def _find_pdf(data: bytes) -> int | None:
    """Where the PDF in these bytes begins, or None if they are something else.

    Blank space before the header is passed over. After other bytes (a mail's or a server's header) it counts
    only if objects of a PDF follow: a text may speak of PDF.
    """
    start = data.find(_HEADER, 0, _HEADER_WITHIN + len(_HEADER))
    if start < 0:
        return None
    blank = not data[:start].strip(b"\0\t\n\f\r \xef\xbb\xbf")
    return start if blank or b"endobj" in data else None


def _encoding(data: bytes) -> tuple[bytes, str] | None:
    return next((mark for mark in _MARKS if data.startswith(mark[0])), None)


def _decode(data: bytes) -> str:
    mark, encoding = _encoding(data) or (b"", "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        advice = "convert it first, for example with iconv -f WINDOWS-1252 -t UTF-8"
        if encoding != "utf-8":
            advice = "its first bytes say that it is"
        raise ValueError(
            f"not {encoding.upper()} text (byte {data[place]:#04x} at offset {place}); {advice}"
        ) from error
    if "\0" in text:
        raise ValueError(_BINARY)
    return text.replace("\r\n", "\n")
