"""Parts of a context's text by token: what a block says, and which document it belongs to.

A context is cut where its tokens are, which may be inside a character; a character that is cut belongs to the
part in which it ends.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from ..engine import Document

_CUT = "\N{REPLACEMENT CHARACTER}"
_PIECE = 64  # tokens that are decoded together to find out how much text they are


class Passage(NamedTuple):
    """The text of some tokens, and what stands right before and behind it."""

    before: str
    text: str
    after: str


class Place(NamedTuple):
    """A document and its tokens, `start` to `end - 1`, to within some 64 tokens."""

    name: str
    start: int
    end: int


def passage(tokenizer: Any, tokens: Sequence[int], start: int, end: int, around: int = 0) -> Passage:
    """The text of tokens `start` to `end - 1`, and of up to `around` tokens on both sides of it.

    Raises:
        ValueError: it is not a part of the text.
    """
    if not 0 <= start < end <= len(tokens):
        raise ValueError(
            f"start and end must be 0 <= start < end <= {len(tokens)} (the text's tokens), got {start}, {end}"
        )
    if around < 0:
        raise ValueError(f"around must be at least 0, got {around}")
    first, last = max(0, start - around), min(len(tokens), end + around)
    # All three begin alike, so that what a tokenizer does to the first token of a text is done to all.
    before, upto, whole = (_decode(tokenizer, tokens[first:stop]) for stop in (start, end, last))
    skipped = len(whole) - len(whole.lstrip(_CUT)) if first else 0  # the rest of a character before `first`
    return Passage(
        before[skipped:], upto[max(skipped, len(before)) :], whole[max(skipped, len(upto)) :].rstrip(_CUT)
    )


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The whole characters of tokens, as they are: no blank is added, none taken away."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip(_CUT)


def places(tokenizer: Any, tokens: Sequence[int], batches: Sequence[Sequence[Document]]) -> list[Place]:
    """Where the documents of a context lie among its tokens.

    Args:
        tokens: of the context.
        batches: its documents, in the order they were added in.

    It decodes all tokens: about a second for a million.
    """
    names = [(d.name, d.text) for batch in batches for d in batch]
    if len(names) == 1:
        return [Place(names[0][0], 0, len(tokens))]
    pieces = [list(tokens[i : i + _PIECE]) for i in range(0, len(tokens), _PIECE)]
    texts = tokenizer.batch_decode(pieces, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends, whole = list(accumulate(map(len, texts))), "".join(texts)
    starts, reached = [], 0
    for number, (name, text) in enumerate(names):
        found = whole.find(f"=== {name} ===", reached) if number or len(batches[0]) > 1 else 0
        starts.append(reached if found < 0 else found)
        reached = min(len(whole), starts[-1] + len(text))
    bounds = [0, *(bisect_right(ends, start) * _PIECE for start in starts[1:]), len(tokens)]
    return [Place(name, *bound) for (name, _), bound in zip(names, pairwise(bounds), strict=True)]
