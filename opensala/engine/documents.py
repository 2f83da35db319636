"""Reading what users point at: files, directories and standard input, as one text.

Text of any kind is taken as it is (UTF-8); PDF goes through pypdf. Everything else is refused with the
reason. It knows nothing of tokens or models.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

STDIN = "-"
_SKIPPED_FOLDERS = {
    ".git",
    ".hg",
    ".svn",
    "__pycache__",
    "node_modules",
    ".venv",
    "venv",
    ".tox",
    ".mypy_cache",
}


@dataclass(frozen=True)
class Document:
    """A name to show and the text read under it."""

    name: str
    text: str


def read_documents(sources: list[str]) -> list[Document]:
    """Read files, directories (all their text files, in order of name) and `-` (standard input).

    Inside a directory, hidden entries, tool folders and files that are not text are passed over.

    Raises:
        ValueError: a source that does not exist, is empty, or cannot be decoded; a directory without text.
    """
    documents: list[Document] = []
    for source in sources:
        if source == STDIN:
            documents.append(
                _checked(Document("standard input", _decode(sys.stdin.buffer.read(), "standard input")))
            )
            continue
        path = Path(source)
        if path.is_dir():
            documents += _read_directory(path)
        elif path.is_file():
            documents.append(_checked(_read_file(path)))
        else:
            raise ValueError(f"{source}: no such file or directory")
    return documents


def join_documents(documents: list[Document]) -> str:
    """One text; with several documents, each under a line with its name."""
    if len(documents) == 1:
        return documents[0].text
    return "\n\n".join(f"=== {d.name} ===\n{d.text}" for d in documents)


def _checked(document: Document) -> Document:
    if not document.text.strip():
        raise ValueError(f"{document.name}: empty (no text in it)")
    return document


def _read_file(path: Path) -> Document:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    text = _pdf_text(path) if data.startswith(b"%PDF-") else _decode(data, str(path))
    return Document(str(path), text)


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text (byte {data[error.start]:#04x} at offset {error.start}); convert it "
            "first, "
            "for example with iconv"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{name}: looks like a binary file (it holds zero bytes); only text and PDF are read"
        )
    return text.replace("\r\n", "\n")


def _pdf_text(path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(path)
        if reader.is_encrypted:
            raise ValueError(f"{path}: the PDF is encrypted; decrypt it first")
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except PyPdfError as error:
        raise ValueError(f"{path}: not a readable PDF ({error})") from error


def _read_directory(folder: Path) -> list[Document]:
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or _SKIPPED_FOLDERS & set(parts) or any(p.startswith(".") for p in parts):
            continue
        try:
            found.append(_checked(_read_file(path)))
        except ValueError:  # not text: a directory is read for the text in it
            continue
    if not found:
        raise ValueError(f"{folder}: no text files in this directory")
    return found
