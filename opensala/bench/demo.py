"""The demonstration: a question about a long text, and what full attention would have cost.

With a converted model that was pulled: a question about a real document, and the same document read by the
original it was made from. Without one: a fact hidden in the standard library's sources for the small model,
and a full-attention twin of random weights.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..data.facts import attribute_fact
from ..data.prompts import PromptFormat
from ..data.text import chapter, long_document, provenance
from ..engine import Engine, Generation, SamplingParams, generate, load_engine
from ..hub import DELTAS, checkpoint_folder, installed
from .twin import TwinTiming, build_dense, time_twin, twin_config

SMALL_TOKENS, REAL_TOKENS = 32_768, 16_384
QUESTION = "When is the method __del__ called?"  # the chapter on special method names says it


def hide_fact(engine: Engine, tokens: int, rng: random.Random) -> tuple[list[int], str, str, str, float]:
    """A document of about `tokens` tokens of standard-library sources with one fact in it.

    Returns prompt ids, the statement, the question, the expected answer, and how deep (0 to 1) the
    fact lies.
    """
    fact = attribute_fact(rng, attribute=rng.choice(("access code", "vault code", "serial number")))
    while not fact.answer.isdigit():
        fact = attribute_fact(rng, attribute="access code")
    sample = long_document(200_000, seed=rng.randrange(1 << 30))
    tokens_per_character = len(engine.tokenizer(sample)["input_ids"]) / len(sample)
    text = long_document(int(tokens / tokens_per_character), seed=rng.randrange(1 << 30))
    cut = text.rfind("\n", 0, rng.randrange(1, len(text))) + 1
    depth = cut / len(text)
    text = f"{text[:cut]}{fact.statement}\n{text[cut:]}"
    form = PromptFormat(engine.tokenizer)
    ids = form.encode(form.question(text, fact.question))
    return ids, fact.statement, fact.question, fact.answer, depth


def run(tokens: int | None = None, seed: int | None = None, model: str | None = None) -> None:
    """Run the demonstration and print a table.

    Args:
        tokens: of the text; about as much as a demonstration of a minute or two takes by default.
        seed: of the fact and its place; drawn by default.
        model: a converted model of the catalogue, or `small`; by default the former if one was pulled.

    Raises:
        ValueError: a model that is not in the catalogue, or was not pulled.
    """
    console = Console(stderr=True)
    pulled = [name for name in DELTAS if installed(name) and installed(DELTAS[name].base)]
    if model not in (None, "small", *DELTAS):
        raise ValueError(f"model must be one of small, {', '.join(DELTAS)}, got {model!r}")
    if model is None and not pulled:
        names = " or ".join(f"opensala pull {name}" for name in DELTAS)
        console.print(
            f"no converted model is on this machine ({names}): the small one is shown",
            highlight=False,
            soft_wrap=True,
        )
    chosen = model or (pulled[0] if pulled else "small")
    if chosen == "small":
        _run_small(console, tokens or SMALL_TOKENS, random.randrange(10**6) if seed is None else seed)
    else:
        _run_real(console, chosen, tokens or REAL_TOKENS)


def _run_small(console: Console, tokens: int, seed: int) -> None:
    """Exits with code 1 if the answer is wrong."""
    engine = load_engine()
    ids, statement, question, expected, depth = hide_fact(engine, tokens, random.Random(seed))
    console.print(
        f"{len(ids):,} tokens of {provenance()} sources; hidden {depth:.0%} deep: {statement!r} (seed "
        f"{seed})",
        highlight=False,
    )
    _introduce(console, engine)
    result = generate(engine, ids, SamplingParams(max_tokens=24), label="MiniCPM-SALA reads")
    answer = PromptFormat(engine.tokenizer).answer(result.text)
    timing = _time_dense(console, "full-attention twin reads", build_dense(twin_config(engine.config)), ids)
    found = expected in answer
    print(
        f"question: {question}\nanswer:   {answer}   ({'right' if found else f'wrong: expected {expected}'})"
    )
    _print_table(result, len(ids), timing, "full attention")
    if not found:
        sys.exit(1)


def _run_real(console: Console, name: str, tokens: int) -> None:
    from transformers import AutoModelForCausalLM

    engine, base = load_engine(name), DELTAS[name].base
    form = PromptFormat(engine.tokenizer)
    text = chapter("specialnames", 8 * tokens)
    kept = engine.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ids = form.encode(form.question(text[: kept[: tokens - 64][-1][1]], QUESTION))
    console.print(f"{len(ids):,} tokens of the Python Language Reference ({provenance()})", highlight=False)
    _introduce(console, engine)
    result = generate(engine, ids, SamplingParams(max_tokens=48), label=f"{name} reads")
    print(f"question: {QUESTION}\nanswer:   {form.answer(result.text)}")
    original = AutoModelForCausalLM.from_pretrained(
        checkpoint_folder(base), dtype=engine.model.dtype, attn_implementation="sdpa"
    ).eval()
    timing = _time_dense(console, f"{base}, full attention, reads", original, ids)
    _print_table(result, len(ids), timing, base)


def _introduce(console: Console, engine: Engine) -> None:
    count = sum(p.numel() for p in engine.model.parameters())
    console.print(
        f"model: {count / 1e6:.1f}M parameters, {engine.config.num_hidden_layers} layers; "
        f"threads: {torch.get_num_threads()}",
        highlight=False,
    )


def _time_dense(console: Console, label: str, model: Any, ids: list[int]) -> TwinTiming:
    """Time a model with full attention, showing its progress by layers."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} layers"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(label, total=len(model.model.layers))
        step: Callable[[], None] = lambda: bar.advance(task)  # noqa: E731
        return time_twin(model, torch.tensor([ids]), on_layer=step)


def _print_table(result: Generation, tokens: int, twin: TwinTiming, other: str) -> None:
    first, decode = result.time_to_first_token, result.decode_tokens_per_second or 0.0
    table = Table(box=None, pad_edge=False)
    for column in ("", "MiniCPM-SALA", other, "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "time to first token",
        f"{first:.1f} s",
        f"{twin.time_to_first_token:.1f} s",
        f"{twin.time_to_first_token / first:.1f}x",
    )
    table.add_row(
        "reading", f"{tokens / first:,.0f} tokens/s", f"{tokens / twin.time_to_first_token:,.0f} tokens/s", ""
    )
    table.add_row(
        "generating",
        f"{decode:,.0f} tokens/s",
        f"{twin.decode_tokens_per_second:,.0f} tokens/s",
        f"{decode / twin.decode_tokens_per_second:.1f}x",
    )
    table.add_row(
        "cache",
        f"{result.cache_bytes / 2**20:.1f} MiB",
        f"{twin.cache_bytes / 2**20:.1f} MiB",
        f"{twin.cache_bytes / result.cache_bytes:.1f}x",
    )
    Console(file=sys.stdout).print(table)
