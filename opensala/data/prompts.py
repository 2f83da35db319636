"""From a document and a question to the text a model is given, and to its tokens.

A model with a chat template gets both as one user message; one without gets the question after the document,
as `facts.format_question` writes it. It knows the tokenizer, but no model.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from .facts import format_question

NEXT_QUESTION = "\nQuestion:"  # how a model without chat template goes on when its answer is complete


@dataclass(frozen=True)
class PromptFormat:
    """How a tokenizer's model wants to be asked.

    Args:
        tokenizer: a transformers tokenizer.
        chat: use the chat template; None for "if there is one".

    Raises:
        ValueError: a chat template is asked for and the tokenizer has none.
    """

    tokenizer: Any
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError(
                "chat=True, but the tokenizer has no chat template: use chat=False or another checkpoint"
            )

    @property
    def uses_chat(self) -> bool:
        return bool(self.tokenizer.chat_template) if self.chat is None else self.chat

    def question(self, document: str, question: str) -> str:
        """The whole prompt: a document, then a question about it."""
        if self.uses_chat:
            content = f"{document}\n\n{question}" if document else question
            return self.messages([{"role": "user", "content": content}])
        return document + format_question(question)

    def messages(self, messages: list[dict[str, str]]) -> str:
        """The whole prompt: a conversation whose next turn is the model's."""
        if self.uses_chat:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
        return "\n\n".join([*turns, "Assistant:"])

    @property
    def stop_strings(self) -> list[str]:
        """Text at which generation may stop: what follows is no part of the answer."""
        return [] if self.uses_chat else [NEXT_QUESTION]

    def answer(self, text: str) -> str:
        """The answer in a generated text: it ends where an invented next question begins."""
        for stop in self.stop_strings:
            text = text.partition(stop)[0]
        return text.strip()

    def encode_question(self, document: str, question: str) -> tuple[list[int], int]:
        """Token ids of `question(document, question)`, and how many of them end before the question's own
        text.

        0 where the template changes the question, or the tokenizer does not say where its tokens lie.
        """
        text = self.question(document, question)
        start = text.rfind(question)
        if start < 0 or not self.tokenizer.is_fast:
            return self.encode(text), 0
        found = self.tokenizer(
            text, add_special_tokens=not self.uses_chat, return_offsets_mapping=True, verbose=False
        )
        offsets = found["offset_mapping"]
        return found["input_ids"], bisect_right(offsets, start, key=lambda place: place[1])

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; a chat template brings its own special tokens."""
        return self.tokenizer(text, add_special_tokens=not self.uses_chat, verbose=False)["input_ids"]
