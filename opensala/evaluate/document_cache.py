"""Generated documents kept on disk as token ids, so that a second model or mode does not make them again.

A file's name is the hash of all that decides what is in it: the tokenizer, the prompt's form, the generators'
own source and what the document was asked to be. A file that cannot be read is made anew.
"""

import hashlib
import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..data import ruler
from ..data.prompts import PromptFormat
from ..data.ruler import RulerTask
from ..data.ruler.types import RulerQuestion

Prompts = Sequence[tuple[int, ...]]


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensala" / "documents"


@lru_cache(maxsize=1)
def generators_fingerprint() -> str:
    """Hash of the sources that make documents, and of the Python whose prose they are filled with."""
    digest = hashlib.sha256(platform.python_version().encode())
    for file in sorted(Path(ruler.__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class DocumentCache:
    """Documents in a folder, for one tokenizer and prompt format.

    Args:
        folder: made when the first document is kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None, form: PromptFormat) -> None:
        self.folder, self.form, self._base = folder, form, ""
        if folder is not None:
            tokenizer = form.tokenizer
            text = (
                tokenizer.backend_tokenizer.to_str()
                if tokenizer.is_fast
                else repr(sorted(tokenizer.get_vocab().items()))
            )
            self._base = repr(
                (
                    generators_fingerprint(),
                    hashlib.sha256(text.encode()).hexdigest(),
                    tokenizer.chat_template,
                    form.uses_chat,
                )
            )

    def document(
        self, task: RulerTask, length: int, index: int, seed: int, questions: int
    ) -> tuple[Prompts, tuple[RulerQuestion, ...]]:
        """Token ids of each question's prompt, and the questions; see `RulerTask.document`."""
        path = self._path(task.name, length, index, seed, questions)
        if path is not None and (held := _read(path)) is not None:
            return held
        fitted = task.document(length, self.form, index=index, seed=seed, questions=questions)
        if path is not None:
            _write(path, fitted.prompts, fitted.document.questions)
        return fitted.prompts, fitted.document.questions

    def _path(self, *what: Any) -> Path | None:
        return (
            None
            if self.folder is None
            else self.folder / f"{hashlib.sha256(repr((self._base, what)).encode()).hexdigest()[:40]}.npz"
        )


def _write(path: Path, prompts: Prompts, questions: Sequence[RulerQuestion]) -> None:
    """The first prompt whole, of the others only what differs: they begin alike."""
    first = np.asarray(prompts[0])
    common = [_common(first, np.asarray(p)) for p in prompts]
    rests = [np.asarray(p[n:], dtype=np.uint32) for p, n in zip(prompts, common, strict=True)]
    text = json.dumps([[q.text, q.references, q.depth] for q in questions])
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".new")
    with os.fdopen(handle, "wb") as file:
        np.savez(
            file,
            first=first.astype(np.uint16 if first.max() < 2**16 else np.uint32),
            common=common,
            ends=np.cumsum([len(r) for r in rests]),
            rests=np.concatenate(rests),
            questions=np.frombuffer(text.encode(), dtype=np.uint8),
        )
    os.replace(temporary, path)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    short = min(len(a), len(b))
    different = np.flatnonzero(a[:short] != b[:short])
    return int(different[0]) if len(different) else short


def _read(path: Path) -> tuple[Prompts, tuple[RulerQuestion, ...]] | None:
    try:
        with np.load(path, allow_pickle=False) as held:
            first, rests = held["first"], np.split(held["rests"], held["ends"][:-1])
            prompts = [
                tuple(np.concatenate((first[:n].astype(np.int64), rest)).tolist())
                for n, rest in zip(held["common"], rests, strict=True)
            ]
            questions = tuple(
                RulerQuestion(text, tuple(references), depth)
                for text, references, depth in json.loads(held["questions"].tobytes())
            )
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
    ):  # not there, or cut off in the writing
        return None
    return prompts, questions
