"""Long-context tasks made as they are needed, at any length: retrieval, multi-hop tracing, questions across
documents, and questions about the user's own texts.

Number n of a source is the same whenever it is asked for. Each is a conversation: a document with a question,
the answer, further questions about the same document.
"""

import math
import random
from typing import Any

from ...data.conversations import Conversations, Texts
from ...data.documents import TrainingDocument, installed_texts, pool
from ...data.facts import random_facts
from ...data.haystack import Haystack
from ...data.prompts import PromptFormat
from ...data.retrieval import hide, place
from ...data.ruler import ruler_task
from ...model.config import check_choice

TASKS = ("facts", "tracing", "cross", "questions")
_SHORTEST = {"facts": 192, "tracing": 512, "cross": 512, "questions": 256}
_RULER = {"tracing": "vt", "cross": "qa_2"}
_TOKENS_A_FACT = 96
_CHARACTERS = 300_000  # of each kind of text in the haystack
_MOST_FACTS = 16
_POOL = 30_000_000  # characters of the user's texts that questions are asked about


class Synthetic:
    """Endless conversations of one task.

    Args:
        task: `facts` (retrieval), `tracing` (variables handed on), `cross` (a question that joins two
            entries), `questions` or `questions:PATH` (values, absent facts, sentences and instructions as
            `opensala.data.conversations` makes them, about the documents of a file, folder or pattern, or
            about the texts of the installation).
        tokenizer: a transformers tokenizer.
        longest: tokens of the longest conversation; lengths are spread evenly in their logarithm below it.
        chat: lengths are measured in the tokenizer's chat template.
    """

    def __init__(self, task: str, tokenizer: Any, longest: int, seed: str, chat: bool) -> None:
        task, _, path = task.partition(":")
        check_choice("synthetic:", task, TASKS)
        if path and task != "questions":
            raise ValueError(f"synthetic:{task} takes no path, got {path!r}; synthetic:questions:PATH does")
        if longest < _SHORTEST[task]:
            raise ValueError(
                f"synthetic:{task} needs sequences of at least {_SHORTEST[task]} tokens, got {longest}"
            )
        self.task, self.tokenizer, self.longest, self.seed, self.chat = task, tokenizer, longest, seed, chat
        self.position, self.skipped = 0, 0
        texts = (
            [text for kind in ("code", "prose") for text in installed_texts(kind, _CHARACTERS)]
            if task == "facts"
            else []
        )
        self.haystack = Haystack(tokenizer, 2 * _CHARACTERS, texts=texts) if texts else None
        self.conversations = self._open(path) if task == "questions" else None

    def _open(self, path: str) -> Conversations:
        """The questions about a path's documents, or about the installation's texts."""
        texts = pool(path, _POOL) if path else installed_texts("prose", _CHARACTERS)
        found = Texts(texts)
        sample = "\n".join(text[:2000] for text in found.documents[:50])
        tokens = len(self.tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
        self._characters_per_token = len(sample) / max(1, tokens)
        return Conversations(found, self.seed)

    def next(self) -> TrainingDocument:
        number = self.position
        self.position += 1
        rng = random.Random(f"{self.seed} {number}")
        low = math.log(_SHORTEST[self.task])
        length = int(math.exp(low + (math.log(self.longest) - low) * rng.random() ** 0.5))
        if self.task == "questions":
            messages: list[dict[str, Any]] = self._questions(number, length)
        else:
            messages = self._facts(rng, length) if self.task == "facts" else self._ruler(number, length)
        return TrainingDocument(f"synthetic:{self.task} {number}", messages=messages)

    def _questions(self, number: int, length: int) -> list[dict[str, Any]]:
        """A conversation of at most `length` tokens: digits and names take more of them than prose, so the
        text is shortened until it fits."""
        assert self.conversations is not None
        form = PromptFormat(self.tokenizer, self.chat and bool(self.tokenizer.chat_template))
        characters = int(0.95 * length * self._characters_per_token)
        while True:
            messages = self.conversations.conversation(number, characters).messages
            used = len(form.encode(form.messages(messages)))
            if used <= length or characters <= 400:
                return [*messages]
            characters = max(400, int(characters * min(0.95, 0.98 * length / used)))

    def _facts(self, rng: random.Random, length: int) -> list[dict[str, Any]]:
        """A document of about 95% of `length` with hidden facts, all asked for."""
        assert self.haystack is not None
        facts = random_facts(rng, max(1, min(_MOST_FACTS, length // _TOKENS_A_FACT - 1)), self.haystack.words)
        statements = [place(rng, fact) for fact in facts]
        parts = [*statements, *(f"\n\n{fact.question}\nAnswer: {fact.answer}" for fact in facts)]
        used = sum(len(ids) + 2 for ids in self.tokenizer(parts, add_special_tokens=False)["input_ids"])
        hay = self.haystack.span(rng, max(16, int(0.95 * length) - used))
        text = self.tokenizer.decode(hide(self.tokenizer, rng, hay, statements).tolist())
        asked = rng.sample(facts, len(facts))
        turns = []
        for n, fact in enumerate(asked):
            question = f"{text}\n\n{fact.question}" if n == 0 else f"\n\n{fact.question}"
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]
        return turns

    def _ruler(self, number: int, length: int) -> list[dict[str, Any]]:
        form = PromptFormat(self.tokenizer, self.chat and bool(self.tokenizer.chat_template))
        made = ruler_task(_RULER[self.task]).document(
            length, form, index=number, seed=int.from_bytes(self.seed.encode()[-6:], "big")
        )
        question = made.document.questions[0]
        answer = ", ".join(question.references) if self.task == "tracing" else question.references[0]
        return [
            {"role": "user", "content": f"{made.document.text}\n\n{question.text}"},
            {"role": "assistant", "content": answer},
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
