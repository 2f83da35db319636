"""Prompts that begin alike, answered with their common beginning read once.

After each answer the cache goes back to the end of the common part. Every answer is the one the prompt would
get
alone: the length of the whole prompt decides between dense and sparse attention, so prompts on different
sides of `dense_len` share nothing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model import SALACache
from .generate import Engine
from .prefill import Progress, prefill


@dataclass(frozen=True)
class Answer:
    """A greedy answer and what it took; the common part's tokens and seconds stand with the first prompt."""

    text: str
    new_tokens: int
    read_tokens: int
    seconds: float


@torch.no_grad()
def answer_shared(
    engine: Engine, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, progress: Progress | None = None
) -> Iterator[Answer]:
    """Greedy answers to prompts (token ids), in their order, each as soon as it is there.

    Raises:
        ValueError: no prompts, an empty one, or one that memory cannot hold.
    """
    if not prompts or not all(prompts):
        raise ValueError(
            f"every prompt needs at least one token, got prompts of {[len(p) for p in prompts]} tokens"
        )
    longest = max(map(len, prompts))
    engine.check_prompt(longest, max_new_tokens)
    if len(set(engine.model.model._sparse([len(p) for p in prompts]))) > 1:
        for prompt in prompts:
            yield from answer_shared(engine, [prompt], max_new_tokens=max_new_tokens, progress=progress)
        return
    start = time.perf_counter()
    common = shared_length(prompts)
    cache, point = SALACache(engine.config), None
    if common and len(prompts) > 1:
        prefill(
            engine.model,
            _row(engine, prompts[0][:common]),
            cache,
            following=longest - common,
            new_tokens=max_new_tokens,
            progress=progress,
        )
        point = cache.snapshot()
    read = common if point else 0
    for prompt in prompts:
        rest = prompt
        if point is not None:
            cache.restore(point)
            rest = prompt[common:]
        else:
            cache.reset()
        logits = prefill(
            engine.model, _row(engine, rest), cache, new_tokens=max_new_tokens, progress=progress
        )
        tokens = greedy_tokens(engine, cache, logits, max_new_tokens)
        text = engine.tokenizer.decode(tokens, skip_special_tokens=True)
        yield Answer(text, len(tokens), read + len(rest), time.perf_counter() - start)
        read, start = 0, time.perf_counter()


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; at least one is left to each."""
    first = np.asarray(prompts[0])
    common = min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        different = np.flatnonzero(first[:common] != np.asarray(prompt[:common]))
        common = int(different[0]) if len(different) else common
    return common


def _row(engine: Engine, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=engine.device)


def greedy_tokens(engine: Engine, cache: SALACache, logits: Tensor, max_new_tokens: int) -> list[int]:
    """The most likely continuation, token by token, up to an end of text; logits `[1, V]` are those behind
    what the cache holds."""
    stops = engine.config.eos_token_id
    stop_ids = stops if isinstance(stops, list) else [stops]
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        token = int(logits[0].argmax())
        if token in stop_ids:
            break
        tokens.append(token)
        logits = engine.model(input_ids=_row(engine, [token]), past_key_values=cache, use_cache=True).logits[
            :, -1
        ]
    return tokens
