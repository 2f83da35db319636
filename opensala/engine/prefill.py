"""Reading a prompt in chunks: activations stay the size of one chunk however long the prompt is."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import MiniCPMSALAForCausalLM, SALACache

CHUNK = 4096  # tokens
Progress = Callable[[int], None]  # called with the number of tokens just read


@torch.no_grad()
def prefill(
    model: MiniCPMSALAForCausalLM,
    ids: Tensor,
    cache: SALACache,
    *,
    chunk: int = CHUNK,
    new_tokens: int = 0,
    following: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Read `ids` `[B, T]` into `cache`, `chunk` tokens at a time.

    The whole length is announced first, so the outcome does not depend on `chunk`. An interruption leaves
    the cache valid at the end of the last whole chunk.

    Args:
        new_tokens: how many tokens will be generated afterwards (room is made for them).
        following: prompt tokens that come in later calls; they count in the length that decides between dense
            and sparse attention.
        progress: called after each chunk with its number of tokens.

    Returns:
        Logits of the last position, `[B, vocab]`.

    Raises:
        ValueError: an empty prompt or a chunk size below 1.
    """
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty")
    if chunk < 1:
        raise ValueError(f"the chunk size must be at least 1, got {chunk}")
    cache.begin_prompt([ids.shape[1] + following] * ids.shape[0], new_tokens)
    logits = None
    for part in ids.split(chunk, dim=1):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if progress is not None:
            progress(part.shape[1])
    assert logits is not None, "there was at least one chunk"
    return logits[:, -1]
