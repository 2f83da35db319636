"""Asking a question about documents: build the prompt, check it, generate the answer."""

from collections.abc import Callable
from dataclasses import replace

from ..data.prompts import PromptFormat
from .answer import Generation, generate
from .decode import check_text
from .documents import Document, join_documents
from .engine import Engine
from .request import SamplingParams, TokenEvent

# Of the small model's right answers 2% have a token less likely than this, of its six wrong ones four
# (scripts/measure_confidence.py, docs/small-model.md). It answers with a value or `not found`; a
# model with a chat template answers in sentences, which have unlikely words without being wrong.
DOUBTFUL = 0.8


def build_prompt(engine: Engine, documents: list[Document], question: str) -> tuple[list[int], int]:
    """Token ids: the documents, then the question, in the form that evaluation scores.

    Returns:
        The ids, and how many of them come before the question: from there another question may continue.

    Raises:
        ValueError: a question that is empty, not valid UTF-8, or alone exceeds the model's limit.
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
    return PromptFormat(engine.tokenizer).encode_question(join_documents(documents), question)


def ask(
    engine: Engine,
    documents: list[Document],
    question: str,
    params: SamplingParams | None = None,
    *,
    quiet: bool = False,
) -> Generation:
    """Read the documents and answer the question. The answer ends where an invented next question begins.

    An answer with a token less likely than `DOUBTFUL` comes with a note that the documents may not say it
    (not from a model with a chat template, for whose sentences that was not measured).

    Another question about the same documents, asked of the same engine, does not read them again.

    Raises:
        ValueError: see `build_prompt` and `Engine.add`.
    """
    ids, before = build_prompt(engine, documents, question)
    return answer_prompt(engine, ids, before, params, quiet=quiet)


def answer_prompt(
    engine: Engine,
    ids: list[int],
    before: int,
    params: SamplingParams | None = None,
    *,
    quiet: bool = False,
    on_event: Callable[[TokenEvent], None] | None = None,
) -> Generation:
    """Answer a prompt that ends with a question; later prompts may continue from its first `before` tokens.

    `on_event` is called with each event. Notes and end of the answer are those of `ask`.

    Raises:
        ValueError: see `Engine.add`.
    """
    form, params = PromptFormat(engine.tokenizer), params or SamplingParams()
    params = replace(params, stop=(*params.stop, *form.stop_strings))
    marks = (before,) if before else ()
    label = f"reading {len(ids):,} tokens"
    result = generate(engine, ids, params, marks=marks, label=label, quiet=quiet, on_event=on_event)
    result.text = form.answer(result.text)
    unlikely = result.least_confidence is not None and result.least_confidence < DOUBTFUL
    if unlikely and not form.uses_chat:
        result.notes.append(
            "the documents may not say this: the least likely token of the answer has probability "
            f"{result.least_confidence:.2f} (answers that they give rarely have one below {DOUBTFUL})"
        )
    return result
