"""Asking a question about documents: build the prompt, check it, generate the answer."""

from torch import Tensor

from ..data.facts import format_question
from .documents import Document, join_documents
from .generate import Engine, Generation, Sampling


def build_prompt(engine: Engine, documents: list[Document], question: str) -> Tensor:
    """Token ids `[1, T]`: the documents, then the question, in the model's chat template if it has one.

    Raises ValueError for an empty question, or one that alone exceeds the model's limit.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    limit = engine.config.max_position_embeddings
    asked = len(engine.tokenizer(question, add_special_tokens=False)["input_ids"])
    if asked >= limit:
        raise ValueError(
            f"the question has {asked:,} tokens, the model's limit is {limit:,}: put long text into a "
            "document"
        )
    text = join_documents(documents)
    if engine.tokenizer.chat_template:
        messages = [{"role": "user", "content": f"{text}\n\n{question.strip()}"}]
        ids = engine.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return ids["input_ids"].to(engine.device)
    return engine.encode_prompt(text + format_question(question.strip()))


def ask(
    engine: Engine, documents: list[Document], question: str, sampling: Sampling, *, quiet: bool = False
) -> Generation:
    """Read the documents and answer the question.

    Raises:
        ValueError: see `build_prompt` and `Engine.generate`.
    """
    ids = build_prompt(engine, documents, question)
    result = engine.generate(ids, sampling, label=f"reading {ids.shape[1]:,} tokens", quiet=quiet)
    result.text = result.text.strip()
    return result
