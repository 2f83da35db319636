"""Several questions about one document, read once: after each answer the cache goes back to the document's end."""

import torch

from ..model import SALACache
from .generate import Engine
from .prefill import Progress, prefill


@torch.no_grad()
def answer_all(engine: Engine, document: list[int], questions: list[list[int]], *, max_new_tokens: int = 24,
               progress: Progress | None = None) -> list[str]:
    """Greedy answers to questions (token ids) that each follow the same document (token ids)."""
    cache = SALACache(engine.config)
    extra = max(map(len, questions)) + max_new_tokens
    ids = torch.tensor([document], device=engine.device)
    prefill(engine.model, ids, cache, new_tokens=extra, progress=progress)
    end, stops = cache.snapshot(), engine.config.eos_token_id
    stop_ids = stops if isinstance(stops, list) else [stops]
    answers = []
    for question in questions:
        cache.restore(end)
        logits = prefill(engine.model, torch.tensor([question], device=engine.device), cache, new_tokens=max_new_tokens)
        tokens: list[int] = []
        while len(tokens) < max_new_tokens:
            token = int(logits[0].argmax())
            if token in stop_ids:
                break
            tokens.append(token)
            step = torch.tensor([[token]], device=engine.device)
            logits = engine.model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
        answers.append(engine.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return answers
