"""A model that is no hybrid, asked by transformers with attention to everything: what a converted model is
compared with."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ..engine.progress import token_progress
from ..model.compat import CACHE_ARGUMENT

PIECE = 2048  # tokens read at a time


@dataclass(frozen=True)
class Answer:
    """What was generated, how many tokens that were, and how many of the prompt had to be read."""

    text: str
    new_tokens: int
    read_tokens: int


class Original:
    """A causal language model of transformers. Its keys and values are kept from one prompt to the next."""

    def __init__(self, folder: str | Path, dtype: str = "float32", stretch: float = 1.0) -> None:
        """Load a checkpoint folder.

        Args:
            dtype: float32 or bfloat16.
            stretch: how many times longer its contexts become by YaRN (arXiv 2309.00071, without training);
                1 leaves its rotary positions as they are.

        Raises:
            ValueError: a model whose positions are no plain rotary ones is to be stretched.
        """
        config = AutoConfig.from_pretrained(folder)
        if stretch != 1:
            rope = dict(getattr(config, "rope_parameters", None) or {})
            if rope.get("rope_type") != "default":
                raise ValueError(
                    f"{folder} cannot be stretched: its rotary positions are {rope or 'not there'}"
                )
            length = config.max_position_embeddings
            rope |= {"rope_type": "yarn", "factor": stretch, "original_max_position_embeddings": length}
            config.rope_parameters = rope
            config.max_position_embeddings = int(stretch * length)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_tokens: int = config.max_position_embeddings
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=getattr(torch, dtype))
        self._model = loaded.eval()
        self._ids: list[int] = []
        self._cache: Any = DynamicCache()

    @torch.inference_mode()
    def answers(self, label: str, prompts: Sequence[list[int]], budgets: Sequence[int]) -> Iterator[Answer]:
        """Greedy answers of so many tokens at most, one after the other.

        What a prompt has in common with the one before is not read again.

        Raises:
            ValueError: a prompt and its answer are longer than the model's positions reach.
        """
        for ids, budget in zip(prompts, budgets, strict=True):
            if len(ids) + budget > self.max_tokens:
                raise ValueError(
                    f"{label}: {len(ids):,} tokens and {budget} of an answer are more than the "
                    f"{self.max_tokens:,} positions that the model has; it can be stretched"
                )
            kept = self._keep(ids)
            self._read(label, ids, kept)
            tokens = torch.tensor([ids])
            out = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                **{CACHE_ARGUMENT: self._cache},
                max_new_tokens=budget,
                do_sample=False,
            )[0, len(ids) :]
            self._ids = ids + out[:-1].tolist()
            yield Answer(self.tokenizer.decode(out, skip_special_tokens=True), len(out), len(ids) - kept)

    def _keep(self, ids: list[int]) -> int:
        """Leave in the cache what `ids` begins with, but for its last token; how many tokens that is."""
        kept = min(len(os.path.commonprefix([self._ids, ids])), len(ids) - 1)
        more = self._cache.get_seq_length() - kept
        if more:
            self._cache.crop(-more)
        return kept

    def _read(self, label: str, ids: list[int], kept: int) -> None:
        with token_progress(label, len(ids) - kept) as advance:
            for first in range(kept, len(ids) - 1, PIECE):
                part = ids[first : min(first + PIECE, len(ids) - 1)]
                self._model.model(torch.tensor([part]), use_cache=True, **{CACHE_ARGUMENT: self._cache})
                advance(len(part))
            advance(1)
