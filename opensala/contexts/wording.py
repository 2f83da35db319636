"""From documents, questions and turns to the tokens of a context.

A context's tokens are those that a prompt about its documents begins with, whatever the question is: the
answer to a question is that of `opensala ask` about the same documents. It knows the tokenizer, but no model.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..data.prompts import PromptFormat
from ..engine.documents import Document, join_documents

_TRIED = (64, 96, 128, 192, 256, 384)  # tokens of the end of a text that may be taken for themselves
_PROBE = "What is it?"


@dataclass(frozen=True)
class Tail:
    """The end of the documents' text, and how many of the context's last tokens it begins with."""

    text: str = ""
    tokens: int = 0


class Wording:
    """How a tokenizer's model wants to be asked about a context.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.form = PromptFormat(tokenizer)
        self.tokenizer = tokenizer

    @staticmethod
    def joined(batches: list[list[Document]]) -> str:
        """The text of documents that came in several batches: the text grows at its end only."""
        first, *later = batches or [[]]
        more = (f"\n\n=== {d.name} ===\n{d.text}" for batch in later for d in batch)
        return join_documents(first) + "".join(more)

    def document(self, text: str) -> tuple[array, Tail]:
        """The tokens that every prompt about `text` begins with, also if more text follows; and their end."""
        return self._cut(text, whole=True)

    def longer(self, kept: array, tail: Tail, more: str) -> tuple[array, Tail] | None:
        """As `document` for a text that goes on with `more` where `kept` and `tail` end, without cutting it
        anew.

        None if `more` changes how the text before it is cut.
        """
        if not tail.tokens:
            return None
        ids, new = self._cut(tail.text + more, whole=False)
        if ids[: tail.tokens] != kept[-tail.tokens :]:
            return None
        return kept + ids[tail.tokens :], new

    def _cut(self, text: str, whole: bool) -> tuple[array, Tail]:
        """Tokens that prompts about `text` begin with (from `text` on if not `whole`), and their end."""
        prompts = [self.form.question(t, _PROBE) for t in (text, f"{text}\n\n=== more ===\nand more")]
        if not whole:
            prompts = [p[p.find(text) :] for p in prompts]
        special = whole and not self.form.uses_chat
        found = self.tokenizer(
            prompts[0],
            add_special_tokens=special,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        longer = self.tokenizer(prompts[1], add_special_tokens=special, verbose=False)["input_ids"]
        ids = found["input_ids"]
        kept = array("i", ids[: _common(ids, longer)])
        start = prompts[0].find(text)
        tail = Tail()
        if start >= 0 and "offset_mapping" in found:
            tail = self._tail(prompts[0], start, start + len(text), kept, found["offset_mapping"])
        return kept, tail

    def _tail(self, asked: str, start: int, end: int, kept: array, places: list[tuple[int, int]]) -> Tail:
        for count in _TRIED:
            if count > len(kept):
                break
            place = places[len(kept) - count][0]
            if start <= place < end and self._ids(asked[place:])[:count] == list(kept[-count:]):
                return Tail(asked[place:end], count)
        return Tail()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def question(
        self, kept: array, tail: Tail, batches: Callable[[], list[list[Document]]], question: str
    ) -> array:
        """The whole prompt: tokens of the documents, then the first question about them.

        It begins with `kept`, unless the question changes how the documents' end is cut into tokens.
        """
        if tail.tokens:
            asked = self.form.question(tail.text, question)
            ids = self._ids(asked[asked.find(tail.text) :])
            if ids[: tail.tokens] == list(kept[-tail.tokens :]):
                return kept + array("i", ids[tail.tokens :])
        return array("i", self.form.encode(self.form.question(self.joined(batches()), question)))

    def next_question(self, question: str) -> array:
        """What follows an answer to ask another question."""
        if not self.form.uses_chat:
            return array("i", self._ids(self.form.question("", question)))
        marker = "an answer"
        messages = [("user", "a question"), ("assistant", marker), ("user", question)]
        text = self.form.messages([{"role": r, "content": c} for r, c in messages])
        place = text.rfind(marker, 0, text.rfind(question))
        if place < 0:
            raise ValueError("the chat template leaves answers out: a conversation cannot go on with it")
        return array("i", self._ids(text[place + len(marker) :]))

    def answer_tokens(self, tokens: list[int], text: str) -> array:
        """The first of an answer's tokens: those whose text the answer has (a stop is no part of it)."""
        count = len(tokens)
        while count and len(self.tokenizer.decode(tokens[:count], skip_special_tokens=False)) > len(text):
            count -= 1
        return array("i", tokens[:count])


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
