"""Documents to token ids, with a mark on the tokens that are learnt.

A conversation is tokenized turn by turn as a server would see it: the template up to the prompt for an
answer, then the answer alone, so that what is learnt follows exactly what will be given.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .documents import TrainingDocument


@dataclass(frozen=True)
class Example:
    """`ids` `[n]` int32; `learnt` `[n]`: whether the token is a target."""

    ids: np.ndarray
    learnt: np.ndarray


class Encoder:
    """Turns documents into examples.

    Args:
        chat: conversations in the tokenizer's chat template with loss on the assistant's turns; without,
            everything is learnt, and a conversation is written as plain text with questions and answers.

    Raises:
        ValueError: chat without a template; a document without messages in a chat stage; a template that
            rewrites earlier turns, or token ids beyond the vocabulary.
    """

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        if chat and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: give one with --chat-template FILE")
        self.tokenizer, self.chat, self.vocabulary = tokenizer, chat, len(tokenizer)

    def __call__(self, document: TrainingDocument) -> Example:
        if self.chat:
            if document.messages is None:
                raise ValueError(f"{document.place}: a chat stage needs messages")
            return self._conversation(document)
        if document.ids is not None:
            if document.ids and max(document.ids) >= self.vocabulary:
                raise ValueError(
                    f"{document.place}: token {max(document.ids)} is beyond the vocabulary of "
                    f"{self.vocabulary}"
                )
            ids = list(document.ids)
        else:
            ids = self._tokens(document.text if document.text is not None else plain(document.messages or []))
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return Example(np.array(ids, dtype=np.int32), np.ones(len(ids), bool))

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _conversation(self, document: TrainingDocument) -> Example:
        messages, done = document.messages or [], ""
        ids: list[int] = []
        learnt: list[bool] = []
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(document, n, True)
            answered = self._render(document, n + 1, False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise ValueError(
                    f"{document.place}: the chat template rewrites turns before an answer "
                    f"(messages[{n}]): loss on answers "
                    "needs a template that only appends; give one with --chat-template FILE"
                )
            for text, mark in ((asked[len(done) :], False), (answered[len(asked) :], True)):
                tokens = self._tokens(text)
                ids += tokens
                learnt += [mark] * len(tokens)
            done = answered
        if not any(learnt):
            raise ValueError(
                f"{document.place}: the conversation has no answer (a message of role assistant)"
            )
        return Example(np.array(ids, dtype=np.int32), np.array(learnt))

    def _render(self, document: TrainingDocument, turns: int, prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            document.messages[:turns] if document.messages else [],
            tools=document.tools or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )


def plain(messages: list[dict[str, Any]]) -> str:
    """A conversation as text for a model without chat template: documents and questions, `Answer:` and the
    answers."""
    parts = []
    for message in messages:
        parts.append(
            f"\nAnswer: {message['content']}" if message["role"] == "assistant" else str(message["content"])
        )
    return "".join(parts)
