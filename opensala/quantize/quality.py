"""What a model can do, in three figures: perplexity on text, facts found, answers that end by themselves.

Measured before and after quantising, on the same texts. Text and questions come from the Python installation
(`opensala.data`), the part that is held out from training.
"""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.haystack import Haystack
from ..data.needles import needle_document
from ..data.prompts import PromptFormat
from ..data.retrieval import training_sequence
from ..data.text import documents
from ..engine import Engine, FinishReason, SamplingParams
from ..model import MiniCPMSALAForCausalLM

ANSWER_TOKENS = 48  # a longer answer counts as one that did not end
_FACTS = 6  # hidden in each document, each asked for
_CHARACTERS = {"code": 400_000, "prose": 40_000}  # that are read: all there is would take minutes to parse
PERPLEXITY_SEQUENCES = 8


@dataclass(frozen=True)
class Quality:
    """Perplexity of held-out text, facts found of those asked for, and answers that ended by themselves."""

    perplexity: float
    found: int
    ended: int
    asked: int


def calibration_ids(engine: Engine, count: int, length: int, seed: int = 0) -> Tensor:
    """Sequences `[count, length]` to calibrate on: text, and text with facts and the answers to questions
    about them, by turns."""
    return torch.from_numpy(_sequences(engine, count, length, seed, "train"))


def _sequences(engine: Engine, count: int, length: int, seed: int, part: str) -> np.ndarray:
    rng = random.Random(seed)
    haystack = Haystack(engine.tokenizer, sum(_CHARACTERS.values()), seed, texts=_texts(part))
    rows = []
    for n in range(count):
        if n % 2 and length >= 512:  # shorter ones have no room for questions
            facts = min(8, length // 256)
            rows.append(training_sequence(engine.tokenizer, haystack, rng, length, facts).ids)
        else:
            rows.append(haystack.real_span(rng, length))
    return np.stack(rows).astype(np.int64)


@functools.cache
def _texts(part: str, kinds: tuple[str, ...] = tuple(_CHARACTERS)) -> tuple[str, ...]:
    """Texts of each kind, about `_CHARACTERS` of it."""
    found = []
    for kind in kinds:
        total = 0
        for text in documents(kind, part):
            found.append(text)
            total += len(text)
            if total >= _CHARACTERS[kind]:
                break
    return tuple(found)


@torch.no_grad()
def perplexity(model: MiniCPMSALAForCausalLM, ids: Tensor) -> float:
    """Of the next token in sequences `[S, T]`, each read whole."""
    total = 0.0
    for row in ids:
        logits = model(row[None, :-1], use_cache=False).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(min(80.0, total / (ids.shape[0] * (ids.shape[1] - 1))))


def measure_quality(
    engine: Engine,
    *,
    length: int,
    questions: int,
    document_tokens: int,
    seed: int = 1,
    done: Callable[[], None] = lambda: None,
) -> Quality:
    """The quality of an engine's model; the same texts and questions for the same arguments.

    Args:
        length: tokens of each of the sequences that perplexity is measured on.
        questions, document_tokens: of retrieval.
        done: called after each question.
    """
    held_out = torch.from_numpy(_sequences(engine, PERPLEXITY_SEQUENCES, length, seed, "held_out"))
    found = ended = asked = 0
    rng, form = random.Random(seed), PromptFormat(engine.tokenizer)
    text = "\n".join(_texts("held_out", ("code",)))
    while asked < questions:
        start = rng.randrange(max(1, len(text) - 12 * document_tokens))
        document = needle_document(engine.tokenizer, text[start:], document_tokens, _FACTS, rng)
        body = engine.tokenizer.decode(document.ids, skip_special_tokens=True)
        for trial in document.trials[: questions - asked]:
            prompt = form.encode(form.question(body, trial.fact.question))
            params = SamplingParams(max_tokens=ANSWER_TOKENS, stop=tuple(form.stop_strings))
            answer = engine.generate([prompt], params)[0]
            asked += 1
            ended += answer.finish_reason is FinishReason.STOP
            found += trial.fact.answer in form.answer(answer.text)
            done()
    return Quality(perplexity(engine.model, held_out), found, ended, asked)
