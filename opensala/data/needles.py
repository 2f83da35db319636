"""Long documents with several hidden facts at known depths, for measuring retrieval by length and depth."""

import random
from dataclasses import dataclass
from typing import Any

from .facts import Fact, format_question, random_facts
from .written import written_facts


@dataclass(frozen=True)
class Trial:
    """One hidden fact: its question as token ids, the expected answer, and its depth (0 start, 1 end)."""

    fact: Fact
    question: list[int]
    depth: float


@dataclass(frozen=True)
class NeedleDocument:
    """Token ids of a document (with bos) and the facts hidden in it."""

    ids: list[int]
    trials: list[Trial]


def needle_document(
    tokenizer: Any, text: str, length: int, facts: int, rng: random.Random, written: bool = False
) -> NeedleDocument:
    """Hide `facts` facts at evenly spread, jittered depths of `text` and cut it to about `length` tokens.

    Facts are inserted as lines of their own at line ends (at spaces if the text has no lines there), and the
    whole is tokenized as one text, as a user's document would be. With `written` their values are those of
    `written`. Raises ValueError if the text is too short.
    """
    sample = text[:200_000]
    characters_per_token = len(sample) / len(tokenizer(sample, add_special_tokens=False)["input_ids"])
    if len(text) < 0.98 * length * characters_per_token:
        raise ValueError(
            f"the text has about {int(len(text) / characters_per_token):,} tokens, {length:,} are needed"
        )
    text = text[: int(length * characters_per_token)]
    chosen = written_facts(rng, facts).facts if written else random_facts(rng, facts)
    spots = sorted(min(len(text) - 1, int((i + rng.random()) / facts * len(text))) for i in range(facts))
    parts, last, depths = [], 0, []
    for spot, fact in zip(spots, chosen, strict=True):
        cut = max(
            text.rfind("\n", max(last, spot - 2000), spot), text.rfind(" ", max(last, spot - 200), spot), last
        )
        parts += [text[last:cut], f"\n{fact.statement}\n"]
        depths.append(cut / len(text))
        last = cut
    body = tokenizer("".join([*parts, text[last:]]))["input_ids"]
    trials = [
        Trial(fact, tokenizer(format_question(fact.question), add_special_tokens=False)["input_ids"], depth)
        for fact, depth in zip(chosen, depths, strict=True)
    ]
    return NeedleDocument(body, trials)
