"""From logits to tokens, for many requests at once: penalties, temperature, top-k, top-p, min-p.

Every request draws from a generator of its own, one number per token, so that what it gets depends on nobody
else.
A token is the place of that number among the probabilities laid end to end in the order of the vocabulary. A
draft
is accepted if it is the token that would have been drawn anyway: with a draft that was looked up, not drawn,
this is rejection sampling (arXiv 2211.17192, section 2.3, with a draft distribution of one token), and the
text is the same as without drafts.
"""

from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .request import SamplingParams


class Sampled(Protocol):
    """What the sampler has to know of a request."""

    params: SamplingParams
    num_prompt: int

    @property
    def tokens(self) -> SequenceOf[int]: ...


class Choice(NamedTuple):
    """A token, its log-probability under the model's own distribution, and the most likely ones if asked
    for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class NonFiniteLogits(ValueError):
    """The model's output for a request holds NaN or infinity: its weights are damaged, or a format
    overflowed."""


def penalised(logits: Tensor, request: Sampled, text: SequenceOf[int]) -> Tensor:
    """Logits `[V]` after the penalties for what stands in `text`, prompt and answer."""
    params = request.params
    if not params.has_penalties:
        return logits
    logits = logits.float().clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(text)), device=logits.device)
        past = logits[seen]
        logits[seen] = torch.where(
            past > 0, past / params.repetition_penalty, past * params.repetition_penalty
        )
    counts = Counter(text[request.num_prompt :])
    if counts and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(counts), device=logits.device)
        often = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * often
    return logits


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities `[V]` (float64) from which the request samples, of its penalised logits `[V]`."""
    scaled = logits.double() / params.temperature
    if 0 < params.top_k < len(scaled):
        scaled[scaled < scaled.topk(params.top_k).values[-1]] = -torch.inf
    probabilities = scaled.softmax(-1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= params.top_p  # the first one is never beyond
        probabilities[order[beyond]] = 0
    if params.min_p > 0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def draw(probabilities: Tensor, number: float) -> int:
    """The token at `number` (0 to 1) among probabilities `[V]` laid end to end."""
    ends = probabilities.cumsum(-1)
    token = int(torch.searchsorted(ends, ends[-1] * number, right=True))
    last = int(probabilities.nonzero()[-1])  # rounding must not lead beyond it
    return min(token, last)


def choose(
    logits: Tensor,
    request: Sampled,
    text: SequenceOf[int],
    number: float | None,
    allowed: Tensor | None = None,
) -> int:
    """The next token of a request whose text so far is `text`; `number` is its draw, None for a greedy
    one. `allowed` (`[V]` of bool) leaves out all other tokens before anything is cut off or normalised."""
    logits = penalised(logits, request, text)
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
    if number is None:
        return int(logits.argmax())
    return draw(distribution(logits, request.params), number)
