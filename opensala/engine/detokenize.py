"""From tokens to text as it comes: characters that are cut between tokens, and texts at which an answer ends.

A character may take several tokens, and a tokenizer may write a token differently at the beginning of a text;
so a token's text is the difference between decoding the last few tokens with and without it.
"""

from collections.abc import Sequence
from typing import Any

_CUT = "\ufffd"  # what an unfinished character decodes to


class Detokenizer:
    """The text of one answer.

    Args:
        tokenizer: of transformers; None for an engine without one, whose texts are empty.
        stop: texts at which the answer ends; the first one found is cut off, with what is behind it.
        keep_special: special tokens are part of the text.
        lengths: of single tokens in characters, as far as they are known: for others of the same tokenizer
            and `keep_special`.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        keep_special: bool = False,
        lengths: dict[int, int] | None = None,
    ) -> None:
        self._tokenizer, self._stop, self._keep_special = tokenizer, tuple(stop), keep_special
        # Twice a token, what transformers does around its backend takes longer than the decoding. It adds
        # nothing where no spaces are cleaned up.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        cleans_up = getattr(tokenizer, "clean_up_tokenization_spaces", True)
        self._decoder = tokenizer if backend is None or cleans_up else backend
        self._tokens: list[int] = []
        self._lengths = {} if lengths is None else lengths
        self._start = self._read = 0  # tokens before `start` are decoded for good; up to `read`, as context
        self.text = ""  # decoded so far
        self._given = 0  # characters of it that were handed out
        self.stop: str | None = None  # the stop text that came

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self.stop is not None

    def add(self, token: int) -> str:
        """Take the next token; returns the text that is certain now. After it, `stopped` says whether a stop
        text came."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        now = self._decode(self._tokens[self._start :])
        if now.endswith(_CUT):
            return ""
        self.text += now[self._before() :]
        self._start, self._read = self._read, len(self._tokens)
        return self._certain()

    def finish(self) -> str:
        """The rest of the text, an unfinished character at its end included."""
        if self._tokenizer is not None and not self.stopped:
            self.text += self._decode(self._tokens[self._start :])[self._before() :]
            self._start = self._read = len(self._tokens)
            self._cut_at_stop()
        return self._hand_out(len(self.text))

    def _before(self) -> int:
        """Characters of the tokens that are decoded already: mostly a single token, and each of those is
        decoded once for all requests."""
        tokens = self._tokens[self._start : self._read]
        if len(tokens) != 1:
            return len(self._decode(tokens))
        if tokens[0] not in self._lengths:
            self._lengths[tokens[0]] = len(self._decode(tokens))
        return self._lengths[tokens[0]]

    def _decode(self, tokens: list[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=not self._keep_special) if tokens else ""

    def _certain(self) -> str:
        if not self._stop:
            return self._hand_out(len(self.text))
        self._cut_at_stop()
        return self._hand_out(len(self.text) - (0 if self.stopped else self._held_back()))

    def _cut_at_stop(self) -> None:
        """End the text before the first stop text; none begins in what was handed out, for its beginning is
        held back."""
        found = [(place, stop) for stop in self._stop if (place := self.text.find(stop, self._given)) >= 0]
        if found:
            place, self.stop = min(found)
            self.text = self.text[:place]

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        most = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), most, -1):
                if self.text.endswith(stop[:size]):
                    most = size
                    break
        return most

    def _hand_out(self, end: int) -> str:
        some, self._given = self.text[self._given : end], max(self._given, end)
        return some
