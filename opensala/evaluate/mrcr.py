"""OpenAI's MRCR (multi-round co-reference resolution) from its published files, scored by its published rule.

A row is a long conversation in which several requests are alike; the last message asks for the answer to one
of them, to be repeated after a random string. Rows are sorted into bins by the tokens of prompt and answer
with the model's own
tokenizer: (4096, 8192], (8192, 16384], ... up to 1M; a bin is named by its upper end.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..data.prompts import PromptFormat
from .jsonl import check_fields, read_jsonl
from .samples import Group, Sample
from .scoring import mrcr_ratio

FIELDS = {"prompt": str, "answer": str, "random_string_to_prepend": str, "n_needles": int}
BINS = tuple(4096 * 2**n for n in range(9))
BUDGET = 2048  # tokens: the longest answers have about 3,900 characters


class MRCRSuite:
    """MRCR rows of a file, or of all files in a folder.

    Args:
        path: a `.jsonl` or `.parquet` file with the published columns, or a folder of them.
        lengths: bins to run, by their upper end; empty for all.
        samples: rows of each number of needles and bin; 0 for all.

    Raises:
        ValueError: no such file; a row without the columns; a length that is not a bin.
    """

    name = "mrcr"

    def __init__(self, path: Path, lengths: tuple[int, ...] = (), samples: int = 0) -> None:
        for length in lengths:
            if length not in BINS[1:]:
                raise ValueError(
                    "mrcr: length must be the upper end of a bin, one of "
                    f"{', '.join(map(str, BINS[1:]))}; got {length}"
                )
        self._lengths, self._samples = lengths or BINS[1:], samples
        self._files = (
            sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet"))
            if path.is_dir()
            else [path]
        )
        self._names = {f: (f.relative_to(path).as_posix() if path.is_dir() else f.name) for f in self._files}
        if not self._files:
            raise ValueError(f"{path}: holds no .jsonl or .parquet file")

    def settings(self) -> dict[str, Any]:
        return {"budget": BUDGET, **{self._names[f]: _digest(f) for f in self._files}}

    def longest(self) -> int:
        return max(self._lengths)

    def groups(self, form: PromptFormat) -> Iterator[Group]:
        taken: Counter[tuple[int, int]] = Counter()
        for file in self._files:
            for number, row in read_rows(file):
                where = f"{file}, row {number}"
                messages = _messages(row["prompt"], where)
                # a first guess by characters spares tokenizing rows that cannot be in any bin asked for
                if len(row["prompt"]) > 12 * max(self._lengths):
                    continue
                prompt = tuple(form.encode(form.messages(messages)))
                length = bin_of(
                    len(prompt) + len(form.tokenizer(row["answer"], add_special_tokens=False)["input_ids"])
                )
                key = (row["n_needles"], length)
                if length not in self._lengths or (self._samples and taken[key] >= self._samples):
                    continue
                taken[key] += 1
                id = f"mrcr/{self._names[file].removesuffix(file.suffix)}/{number}"
                yield Group((id,), partial(self._load, id, row, prompt, length))

    @staticmethod
    def _load(id: str, row: dict[str, Any], prompt: tuple[int, ...], length: int) -> list[Sample]:
        answer, prefix = row["answer"], row["random_string_to_prepend"]
        return [
            Sample(
                id,
                f"mrcr_{row['n_needles']}needle",
                length,
                prompt,
                (answer,),
                BUDGET,
                "mrcr_ratio",
                lambda prediction: mrcr_ratio(prediction, answer, prefix),
            )
        ]


def bin_of(tokens: int) -> int:
    """Upper end of the bin, closed on the right; 0 if there is none."""
    return next((high for low, high in zip(BINS, BINS[1:], strict=False) if low < tokens <= high), 0)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a published file with their numbers, their columns checked."""
    if path.suffix == ".jsonl":
        yield from read_jsonl(path, FIELDS)
        return
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: must be a .jsonl or .parquet file")
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install 'opensala[eval]'") from error
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error
    number = 0
    for batch in table.iter_batches(batch_size=16):
        for row in batch.to_pylist():
            number += 1
            check_fields(row, FIELDS, f"{path}, row {number}")
            yield number, row


def _messages(text: str, where: str) -> list[dict[str, str]]:
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: field 'prompt' must be a JSON list of messages ({error.msg})") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: field 'prompt' must be a JSON list of messages, got {text[:60]!r}")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(
                f"{where}: field 'prompt' must be a list of messages with role and content, got "
                f"{str(message)[:60]!r}"
            )
        check_fields(message, {"role": str, "content": str}, f"{where}, field 'prompt'")
    return messages


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
