"""Make rows of questions about texts in a model's chat format, packed, with marks on the answers.

    python scripts/corpus/tasks.py smollm2-135m OUT/train.jsonl OUT/tasks --rows 512=4000,4096=450

`LENGTH=COUNT` asks for COUNT rows of exactly LENGTH tokens. A row holds one long conversation or several
shorter ones (`opensala.data.conversations`); what they leave of it is text, unmarked. They go to
OUT/tasks/questions_LENGTH.npy and .answers.npy, which `opensala convert --tokens` reads.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from opensala.data.conversations import Conversations, Texts
from opensala.data.documents import TrainingDocument
from opensala.data.encode import Encoder, Example
from opensala.hub import checkpoint_folder

LEAST = 256  # tokens that a conversation is given
CHARACTERS_PER_TOKEN = 4.0
ONE_IN_A_ROW = 0.7  # share of rows that are filled by one conversation, if it is long enough


class Rows:
    """Rows of one length.

    Args:
        encoder: in the chat format. texts: what is asked about. filler: `[n]` ids of plain text.
        seed: of the conversations.
    """

    def __init__(self, encoder: Encoder, texts: Texts, filler: np.ndarray, seed: str) -> None:
        self.encoder, self.filler = encoder, filler
        self.made, self.number = Conversations(texts, seed), 0
        self.rng = random.Random(seed)

    def conversation(self, limit: int) -> Example:
        """The next conversation, made shorter until it has at most `limit` tokens."""
        characters = int(CHARACTERS_PER_TOKEN * limit)
        while True:
            messages = self.made.conversation(self.number, characters).messages
            example = self.encoder(TrainingDocument("a conversation", messages=messages))
            if len(example.ids) <= limit:
                self.number += 1
                return example
            characters = int(characters * min(0.96, 0.985 * limit / len(example.ids)))
            if characters < 420:  # a conversation does not become shorter: take the next
                self.number += 1
                characters = int(CHARACTERS_PER_TOKEN * limit)

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids `[length]` and marks."""
        ids, marks, at = np.zeros(length, np.uint32), np.zeros(length, bool), 0
        while length - at >= LEAST:
            room = length - at
            whole = self.rng.random() < ONE_IN_A_ROW
            example = self.conversation(
                room if whole else max(LEAST, int(room * self.rng.uniform(0.25, 0.9)))
            )
            end = at + len(example.ids)
            ids[at:end], marks[at:end] = example.ids, example.learnt
            at = end
        start = self.rng.randrange(max(1, len(self.filler) - length))
        rest = self.filler[start : start + length - at]
        ids[at : at + len(rest)] = rest
        return ids, marks


def parse_rows(text: str) -> dict[int, int]:
    """Counts by length, of `LENGTH=COUNT,...`. Exits for anything else."""
    try:
        found = {int(length): int(count) for length, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise SystemExit(f"--rows must be LENGTH=COUNT,... as 512=4000,4096=450, got {text!r}") from None
    if any(length < LEAST or count < 1 for length, count in found.items()):
        raise SystemExit(f"--rows: lengths must be at least {LEAST} and counts at least 1, got {text!r}")
    return found


def write(tokenizer: Any, documents: list[str], folder: Path, wanted: dict[int, int], name: str) -> None:
    """All rows, into `folder`."""
    encoder, texts = Encoder(tokenizer, chat=True), Texts(documents)
    longest = max(wanted)
    sample = "\n\n".join(documents)[: int(8 * CHARACTERS_PER_TOKEN * longest)]
    filler = np.array(tokenizer(sample, add_special_tokens=False)["input_ids"], np.uint32)
    if len(filler) < longest:
        raise SystemExit(f"the texts have {len(filler):,} tokens, a row of {longest:,} needs as many")
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    folder.mkdir(parents=True, exist_ok=True)
    for length, count in wanted.items():
        rows = Rows(encoder, texts, filler, f"{name} {length}")
        pairs = [rows.row(length) for _ in range(count)]
        np.save(folder / f"questions_{length}.npy", np.stack([ids for ids, _ in pairs]).astype(kind))
        marks = np.stack([mark for _, mark in pairs])
        np.save(folder / f"questions_{length}.answers.npy", marks)
        print(f"{count} rows of {length} tokens, {int(marks.sum()):,} of answers", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="whose tokenizer and chat template: a folder, or a pulled model")
    parser.add_argument("texts", type=Path, help="JSON lines of text")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", required=True, help="LENGTH=COUNT,...")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(options.model))
    lines = options.texts.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    write(tokenizer, documents, options.output, parse_rows(options.rows), options.texts.stem)


if __name__ == "__main__":
    main()
