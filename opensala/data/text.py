"""Text that any Python installation carries, for training, demonstrations and tests without downloads.

Three kinds: `code` (the standard library's sources), `prose` (docstrings, help topics, notes and the
descriptions of installed packages) and `headers` (the interpreter's C headers, where they are installed).
It knows nothing of tokens or models.
"""

import ast
import functools
import os
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

KINDS = ("code", "prose", "headers")
PARTS = ("all", "train", "held_out")
_HELD_OUT = 12  # every so-many-th text is held out
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "ensurepip", "lib-dynload"}


@functools.cache
def _files(root: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    """Files below a folder by name, in order. Installed packages below it are not gone into."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED]
        found += [Path(folder, name) for name in names if any(fnmatch(name, p) for p in patterns)]
    return tuple(sorted(p for p in found if p.is_file()))


def read_text(path: Path) -> str | None:
    """Contents of a UTF-8 file with lines ended by newlines; None if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 200:
                yield doc


def prose() -> Iterator[str]:
    """English about programming from the standard library alone: help topics, then docstrings; the same for
    every installation of one Python version."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in _files(Path(sysconfig.get_path("stdlib")), ("*.py",)):
        docs = list(_docstrings(read_text(path) or ""))
        if docs:
            yield "\n\n".join(docs)


def documents(kind: str, part: str = "all") -> Iterator[str]:
    """Texts of one kind, in a fixed order: all of them, or only those to train on or those held out to
    measure with.

    Raises ValueError for an unknown kind or part.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    for n, text in enumerate(_documents(kind)):
        if part == "all" or (n % _HELD_OUT == _HELD_OUT - 1) == (part == "held_out"):
            yield text


def _documents(kind: str) -> Iterator[str]:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    library = Path(sysconfig.get_path("stdlib"))
    if kind == "headers":
        texts: Iterator[str | None] = (
            read_text(p) for p in _files(Path(sysconfig.get_path("include")), ("*.h",))
        )
        yield from (t for t in texts if t)
        return
    sources = (read_text(p) for p in _files(library, ("*.py",)))
    if kind == "code":
        yield from (s for s in sources if s)
        return
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in _files(library, ("*.txt", "*.rst", "*.md")):
        text = read_text(path)
        if text and len(text) > 500:
            yield text
    for package in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"] or ""):
        described = package.read_text("METADATA") or ""
        if len(described) > 1000:
            yield described
    for source in sources:
        if source:
            docs = list(_docstrings(source))
            if docs:
                yield "\n\n".join(docs)


def long_document(characters: int, seed: int = 0, kinds: tuple[str, ...] = ("code",)) -> str:
    """About so many characters of real text, whole files in a random order drawn from `seed`."""
    texts = [t for kind in kinds for t in documents(kind)]
    random.Random(seed).shuffle(texts)
    parts, total = [], 0
    while total < characters:
        for text in texts:
            parts.append(text)
            total += len(text) + 1
            if total >= characters:
                break
    return "\n".join(parts)[:characters]


def chapter(topic: str, characters: int) -> str:
    """A chapter of the Python Language Reference as `help` shows it, up to so many characters; the other
    topics follow, the longest first, where it is too short."""
    from pydoc_data.topics import topics

    others = sorted((name for name in topics if name != topic), key=lambda name: -len(topics[name]))
    parts, total = [], 0
    for name in [topic, *others]:
        if total >= characters:
            break
        parts.append(topics[name].strip())
        total += len(parts[-1]) + 2
    return "\n\n".join(parts)[:characters]


def provenance() -> str:
    """Which installation the texts come from."""
    return f"Python {sys.version.split()[0]} standard library"
