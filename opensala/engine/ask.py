"""Asking a question about documents: build the prompt, check it, generate the answer."""

import torch
from torch import Tensor

from ..data.prompts import PromptFormat
from .decode import check_text
from .documents import Document, join_documents
from .generate import Engine, Generation, Sampling


def build_prompt(engine: Engine, documents: list[Document], question: str) -> Tensor:
    """Token ids `[1, T]`: the documents, then the question, in the form that evaluation scores.

    Raises ValueError for a question that is empty, not valid UTF-8, or alone exceeds the model's limit.
    """
    question = question.strip()
    check_text("the question", question)
    limit = engine.config.max_position_embeddings
    asked = len(engine.tokenizer(question, add_special_tokens=False)["input_ids"])
    if asked >= limit:
        raise ValueError(
            f"the question has {asked:,} tokens, the model's limit is {limit:,}: put long text into a "
            "document"
        )
    form = PromptFormat(engine.tokenizer)
    ids = form.encode(form.question(join_documents(documents), question))
    return torch.tensor([ids], device=engine.device)


def ask(
    engine: Engine, documents: list[Document], question: str, sampling: Sampling, *, quiet: bool = False
) -> Generation:
    """Read the documents and answer the question.

    Raises:
        ValueError: see `build_prompt` and `Engine.generate`.
    """
    ids = build_prompt(engine, documents, question)
    result = engine.generate(ids, sampling, label=f"reading {ids.shape[1]:,} tokens", quiet=quiet)
    result.text = PromptFormat(engine.tokenizer).answer(result.text)
    return result
