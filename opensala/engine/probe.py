"""Several questions about one document, read once: after each answer the cache goes back to the document's
end."""

import torch

from ..model import SALACache
from .generate import Engine
from .prefill import Progress, prefill
from .shared import greedy_tokens


@torch.no_grad()
def answer_all(
    engine: Engine,
    document: list[int],
    questions: list[list[int]],
    *,
    max_new_tokens: int = 24,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to questions (token ids) that each follow the same document (token ids)."""
    cache = SALACache(engine.config)
    extra = max(map(len, questions)) + max_new_tokens
    ids = torch.tensor([document], device=engine.device)
    prefill(engine.model, ids, cache, new_tokens=extra, progress=progress)
    end, answers = cache.snapshot(), []
    for question in questions:
        cache.restore(end)
        logits = prefill(
            engine.model, torch.tensor([question], device=engine.device), cache, new_tokens=max_new_tokens
        )
        tokens = greedy_tokens(engine, cache, logits, max_new_tokens)
        answers.append(engine.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return answers
