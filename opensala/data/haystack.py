"""Documents to hide facts in, as tokens: spans of real text, and made-up text of kinds that real text lacks.

The made-up kinds (logs, tables, shuffled words, repeated sentences, random tokens) are there so that a small
model does not learn to find facts only in the kinds of text it was trained on.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .text import documents
from .words import invented_word

_LEVELS = ("INFO", "DEBUG", "WARN", "ERROR", "TRACE")


class Haystack:
    """Draws token spans of a given length from many kinds of text.

    Args:
        tokenizer: a transformers tokenizer.
        characters: how much of each kind of real text to read and tokenize.
        seed: order in which files are read.
        part: `all` texts, those to `train` on, or those `held_out` (see `opensala.data.text.documents`).
        texts: real text to use instead of what the Python installation carries.
    """

    def __init__(
        self,
        tokenizer: Any,
        characters: int = 6_000_000,
        seed: int = 0,
        part: str = "all",
        texts: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        sources = (
            [list(documents(kind, part)) for kind in ("code", "prose", "headers")]
            if texts is None
            else [list(texts)]
        )
        self.real = [self._tokenize(source, characters, seed) for source in sources]
        self.real = [ids for ids in self.real if len(ids)]
        self.words = self._words()
        self._made: list[Callable[[random.Random], str]] = [
            self._log,
            self._table,
            self._word_salad,
            self._repeated,
            self._foreign_code,
        ]

    def _tokenize(self, texts: list[str], characters: int, seed: int) -> np.ndarray:
        random.Random(seed).shuffle(texts)
        chosen, total = [], 0
        for text in texts:
            if total > characters:
                break
            chosen.append(text[:200_000])
            total += len(chosen[-1])
        encoded = self.tokenizer(chosen, add_special_tokens=False)["input_ids"] if chosen else []
        return np.array([t for ids in encoded for t in ids], dtype=np.int32)

    def _words(self) -> list[str]:
        text = self.tokenizer.decode(self.real[min(1, len(self.real) - 1)].tolist())
        words = {w.strip(".,;:()[]'\"`").lower() for w in text.split()}
        return sorted(w for w in words if w.isalpha() and 2 < len(w) < 12)

    def span(self, rng: random.Random, length: int) -> np.ndarray:
        """`length` tokens of one randomly chosen kind."""
        draw = rng.random()
        if draw < 0.6:
            return self.real_span(rng, length)
        if draw < 0.68:
            return np.array([rng.randrange(3, len(self.tokenizer)) for _ in range(length)], dtype=np.int32)
        if draw < 0.75:
            pieces = [self.real_span(rng, rng.randrange(3, 40)) for _ in range(length // 3)]
            return np.concatenate(pieces)[:length] if pieces else self.real_span(rng, length)
        make, parts, total = rng.choice(self._made), [np.zeros(0, dtype=np.int32)], 0
        while total < length:
            ids = self.tokenizer(make(rng), add_special_tokens=False)["input_ids"]
            parts.append(np.array(ids, dtype=np.int32))
            total += len(ids)
        return np.concatenate(parts)[:length]

    def real_span(self, rng: random.Random, length: int) -> np.ndarray:
        source = rng.choices(self.real, [len(s) ** 0.5 for s in self.real])[0]
        start = rng.randrange(max(1, len(source) - length))
        return source[start : start + length]

    def _log(self, rng: random.Random) -> str:
        part = f"{rng.choice(self.words)}.{rng.choice(self.words)}"
        lines = []
        for _ in range(20):
            stamp = (
                f"2{rng.randrange(10, 99)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02} "
                f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}"
            )
            detail = " ".join(rng.choice(self.words) for _ in range(rng.randrange(3, 9)))
            lines.append(
                f"{stamp} {rng.choice(_LEVELS)} [{part}] {detail} id={rng.randrange(10**6)} took "
                f"{rng.randrange(999)}ms"
            )
        return "\n".join(lines) + "\n"

    def _table(self, rng: random.Random) -> str:
        keys = [rng.choice(self.words) for _ in range(rng.randrange(2, 6))]
        rows = []
        style = rng.randrange(3)
        for _ in range(12):
            values = [
                str(rng.randrange(10**5)) if rng.random() < 0.6 else rng.choice(self.words) for _ in keys
            ]
            if style == 0:
                rows.append(",".join(values))
            elif style == 1:
                rows.append("{" + ", ".join(f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True)) + "}")
            else:
                rows.append("\n".join(f"{k} = {v}" for k, v in zip(keys, values, strict=True)))
        return "\n".join(rows) + "\n"

    def _word_salad(self, rng: random.Random) -> str:
        sentences = []
        for _ in range(8):
            words = [
                rng.choice(self.words) if rng.random() < 0.9 else invented_word(rng)
                for _ in range(rng.randrange(5, 18))
            ]
            sentences.append(" ".join(words).capitalize() + rng.choice((".", ".", ".", "?", "!")))
        return " ".join(sentences) + rng.choice((" ", "\n", "\n\n"))

    def _repeated(self, rng: random.Random) -> str:
        sentences = [
            " ".join(rng.choice(self.words) for _ in range(rng.randrange(3, 8))).capitalize() + "."
            for _ in range(4)
        ]
        return (" ".join(sentences) + rng.choice((" ", "\n"))) * 6

    def _foreign_code(self, rng: random.Random) -> str:
        def word() -> str:
            return rng.choice(self.words)

        lines = [
            f"{rng.choice(('func', 'function', 'fn', 'public static void', 'int', 'void', 'def'))} "
            f"{word()}{word().capitalize()}"
            f"({word()}, {word()}) {{"
        ]
        for _ in range(rng.randrange(4, 12)):
            lines.append(
                "    " * rng.randrange(1, 3)
                + rng.choice(
                    (
                        f"{rng.choice(('let', 'var', 'const', 'int', 'auto', 'my'))} {word()} = "
                        f"{word()}.{word()}({rng.randrange(1000)});",
                        f"if ({word()} {rng.choice(('==', '<', '>=', '!='))} {rng.randrange(100)}) {{ "
                        f"return {word()}; }}",
                        f'{word()}->{word()}({word()}, "{word()} {word()}");',
                        f"// {word()} {word()} {word()} {word()}",
                        f"for (int i = 0; i < {rng.randrange(99)}; i++) {word()}[i] += {word()};",
                        f"{word()}::{word()}<{word()}> {word()} = new "
                        f"{word().capitalize()}({rng.randrange(10)});",
                    )
                )
            )
        return "\n".join([*lines, "}", ""]) + "\n"
