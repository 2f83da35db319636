"""Asking a question about documents: build the prompt, check it, generate the answer."""

from ..data.facts import format_question
from .answer import Generation, generate
from .documents import Document, join_documents
from .engine import Engine
from .request import SamplingParams


def build_prompt(engine: Engine, documents: list[Document], question: str) -> list[int]:
    """Token ids: the documents, then the question, in the model's chat template if it has one.

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
        return engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    return engine.encode(text + format_question(question.strip()))


def ask(
    engine: Engine,
    documents: list[Document],
    question: str,
    params: SamplingParams | None = None,
    *,
    quiet: bool = False,
) -> Generation:
    """Read the documents and answer the question.

    Raises:
        ValueError: see `build_prompt` and `Engine.add`.
    """
    ids = build_prompt(engine, documents, question)
    result = generate(engine, ids, params, label=f"reading {len(ids):,} tokens", quiet=quiet)
    result.text = result.text.strip()
    return result
