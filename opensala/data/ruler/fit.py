"""Making a document of exactly the length that was asked for, in the tokens of a given tokenizer.

A builder takes a size (lines, words, paragraphs: whatever it is made of) and its length grows with it. The
size is found from measured lengths alone, so a builder needs to know nothing of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..prompts import PromptFormat
from .types import RulerDocument

TOLERANCE = 0.01  # of the length asked for, below it; never above
_AIM = 0.997


@dataclass(frozen=True)
class FittedDocument:
    """A document with the token ids of each of its prompts (document and question)."""

    document: RulerDocument
    prompts: tuple[tuple[int, ...], ...]
    length: int  # tokens of the longest prompt, with the answer's budget


def fit_document(
    build: Callable[[int], RulerDocument],
    length: int,
    budget: int,
    form: PromptFormat,
    *,
    least: int = 1,
    first: int = 64,
) -> FittedDocument:
    """The largest document whose longest prompt and `budget` answer tokens take 99% to 100% of `length`
    tokens.

    Args:
        build: makes the document of a given size; the same size gives the same document.
        least: smallest size that `build` takes.
        first: size to measure first.

    Raises:
        ValueError: even the smallest document is too long, or no size comes within 1% of `length`.
    """
    measured: dict[int, tuple[RulerDocument, int, list[int]]] = {}

    def measure(size: int) -> int:
        if size not in measured:
            document = build(size)
            longest = max(
                document.questions,
                key=lambda q: len(form.tokenizer(q.text, add_special_tokens=False)["input_ids"]),
            )
            ids = form.encode(form.question(document.text, longest.text))
            measured.clear()  # the last one only: a document of millions of tokens is large
            measured[size] = document, document.questions.index(longest), ids
        return len(measured[size][2]) + budget

    low, low_tokens = least, measure(least)
    if low_tokens > length:
        raise ValueError(
            f"length {length:,} is too short: the smallest document, its question and {budget} tokens for "
            "the answer "
            f"take {low_tokens:,} with this tokenizer; ask for at least that"
        )
    high, high_tokens, slope = 0, 0, low_tokens / max(1, low)  # high 0: not known yet
    size = max(first, least + 1)
    for _ in range(2 * length.bit_length()):
        if (1 - TOLERANCE) * length <= low_tokens or high == low + 1:
            break
        tokens = measure(size)
        if tokens > length:
            high, high_tokens = size, tokens
        else:
            slope = max((tokens - low_tokens) / (size - low), 1e-6)
            low, low_tokens = size, tokens
        if high:
            slope = (high_tokens - low_tokens) / (high - low)
        size = max(low + 1, low + int((_AIM * length - low_tokens) / slope))
        size = min(size, high - 1) if high else min(size, low * 1000)
    measure(low)
    if low_tokens < (1 - TOLERANCE) * length:
        around = f"{low_tokens:,} tokens" + (f" and {high_tokens:,} tokens" if high else "")
        raise ValueError(
            f"length {length:,} cannot be hit within {TOLERANCE:.0%} with this tokenizer: neighbouring "
            "documents take "
            f"{around}; ask for another length, or use another tokenizer"
        )
    document, longest, ids = measured[low]
    prompts = tuple(
        tuple(ids if i == longest else form.encode(form.question(document.text, q.text)))
        for i, q in enumerate(document.questions)
    )
    return FittedDocument(document, prompts, max(map(len, prompts)) + budget)
