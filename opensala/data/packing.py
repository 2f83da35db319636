"""Text as sequences of equal length: documents one after the other with an end-of-text between them, cut
evenly.

Which sequence comes when depends on seed and step alone, so a run that resumes sees the data it would have
seen.
"""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np


class PackedText:
    """`[N, length]` token sequences.

    Args:
        tokenizer: a transformers tokenizer with an end-of-text token.
        texts: documents.
        length: tokens per sequence.
        name: of the data, for messages.
        characters: stop reading after so many.

    Raises:
        ValueError: the texts do not fill one sequence.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Iterable[str],
        length: int,
        name: str = "data",
        characters: int = 6_000_000,
    ) -> None:
        chosen, total = [], 0
        for text in texts:
            if total > characters:
                break
            chosen.append(text[:200_000])
            total += len(chosen[-1])
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(chosen, add_special_tokens=False)["input_ids"] if chosen else []
        flat = np.array([t for ids in encoded for t in (*ids, *end)], dtype=np.int32)
        count = len(flat) // length
        if not count:
            raise ValueError(
                f"{name} has {len(flat):,} tokens, one sequence needs {length:,}: give more text or "
                "shorter sequences"
            )
        self.rows = flat[: count * length].reshape(count, length)
        self._order: tuple[tuple[int, int], list[int]] | None = None

    def cut(self, length: int, name: str = "data") -> "PackedText":
        """The same text in sequences of another length. Raises ValueError if it does not fill one."""
        flat = self.rows.reshape(-1)
        if len(flat) < length:
            raise ValueError(
                f"{name} has {len(flat):,} tokens, one sequence needs {length:,}: give more text or "
                "shorter sequences"
            )
        other = object.__new__(PackedText)
        other.rows = flat[: len(flat) // length * length].reshape(-1, length)
        other._order = None
        return other

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, seed: int, position: int, count: int) -> np.ndarray:
        """Sequences `position` to `position + count` of an endless stream of shuffled epochs, `[count,
        length]`."""
        chosen = []
        for n in range(position, position + count):
            epoch, place = divmod(n, len(self.rows))
            known = self._order  # of the last call: else all rows would be shuffled anew at every step
            if known is None or known[0] != (seed, epoch):
                order = random.Random(f"{seed} {epoch}").sample(range(len(self.rows)), len(self.rows))
                self._order = known = (seed, epoch), order
            chosen.append(known[1][place])
        return self.rows[chosen]
