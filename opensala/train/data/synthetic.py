"""Long-context tasks made as they are needed, at any length: retrieval, multi-hop tracing, questions across
documents.

Number n of a source is the same whenever it is asked for. Each is a conversation: a document with a question,
the answer, further questions about the same document.
"""

import math
import random
from typing import Any

from ...data.facts import random_facts
from ...data.haystack import Haystack
from ...data.prompts import PromptFormat
from ...data.retrieval import hide, place
from ...data.ruler import ruler_task
from ...model.config import check_choice
from .documents import TrainingDocument, installed_texts

TASKS = ("facts", "tracing", "cross")
_SHORTEST = {"facts": 192, "tracing": 512, "cross": 512}
_RULER = {"tracing": "vt", "cross": "qa_2"}
_TOKENS_A_FACT = 96
_CHARACTERS = 300_000  # of each kind of text in the haystack
_MOST_FACTS = 16


class Synthetic:
    """Endless conversations of one task.

    Args:
        task: `facts` (retrieval), `tracing` (variables handed on), `cross` (a question that joins two
            entries).
        tokenizer: a transformers tokenizer.
        longest: tokens of the longest conversation; lengths are spread evenly in their logarithm below it.
        chat: lengths are measured in the tokenizer's chat template.
    """

    def __init__(self, task: str, tokenizer: Any, longest: int, seed: str, chat: bool) -> None:
        check_choice("synthetic:", task, TASKS)
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

    def next(self) -> TrainingDocument:
        number = self.position
        self.position += 1
        rng = random.Random(f"{self.seed} {number}")
        low = math.log(_SHORTEST[self.task])
        length = int(math.exp(low + (math.log(self.longest) - low) * rng.random() ** 0.5))
        messages = self._facts(rng, length) if self.task == "facts" else self._ruler(number, length)
        return TrainingDocument(f"synthetic:{self.task} {number}", messages=messages)

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
