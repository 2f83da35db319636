"""The demonstration: a question about a long text, and what full attention would have cost.

With the small model: a fact hidden in the standard library's sources, and a full-attention twin of random
weights. With a converted model: a number hidden in a real document, and the same document read by the
original it was made from. The former comes first and alone decides whether all went well, because it answers
rightly.

The converted model is asked for a number, in its chat format with the answer begun, because at this length it
answers nothing else, and not every number either (docs/smollm2.md): what it shows is time and memory.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..convert import published
from ..data.facts import attribute_fact
from ..data.prompts import PromptFormat
from ..data.text import chapter, long_document, provenance
from ..data.words import ADJECTIVES, NOUNS
from ..engine import Engine, Generation, SamplingParams, generate, load_engine
from ..hub import DELTAS, NotFetched, checkpoint_folder
from .twin import TwinTiming, build_dense, time_layers, twin_config

SMALL_TOKENS, REAL_TOKENS = 32_768, 16_384
ORIGINAL_LAYERS = 6  # of a converted model's original: all of them take minutes at these lengths


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


def hide_number(engine: Engine, tokens: int, rng: random.Random) -> tuple[list[int], str, str, str, float]:
    """A chapter of the Python Language Reference with a number in it, as a chat of `tokens` tokens with the
    answer begun; what is returned is that of `hide_fact`."""
    form, thing = PromptFormat(engine.tokenizer), f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    answer = str(rng.randrange(1_000_000, 10_000_000))
    statement = f"The special magic number for the {thing} is {answer}."
    question = f"What is the special magic number for the {thing} mentioned in the text above?"
    begun = f"The special magic number for the {thing} mentioned in the text is"
    around = len(form.encode(form.question(f"{statement}\n\n", question) + begun))
    text = chapter("specialnames", 8 * tokens)
    kept = engine.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    text = text[: kept[: max(1, tokens - around)][-1][1]]
    cut = text.rfind("\n\n", 0, rng.randrange(2, len(text))) + 1
    depth = cut / len(text)
    text = f"{text[:cut]}\n{statement}\n{text[cut:]}"
    return form.encode(form.question(text, question) + begun), statement, question, answer, depth


def run(
    tokens: int | None = None,
    seed: int | None = None,
    model: str | None = None,
    pull: bool = False,
    full: bool = False,
) -> None:
    """Run the demonstration and print a table; exits with code 1 if the answer is wrong.

    Args:
        tokens: of the text; about as much as a demonstration of a minute or two takes by default.
        seed: of the fact and its place; drawn by default.
        model: a converted model of the catalogue, or `small`; None for the small one.
        pull: get the converted model, unless it is here. Without `model` it is shown after the small one,
            whose answer alone decides about the exit code. Where no place that has it answers, this is said.
        full: run all layers of the original, not some of them with the rest counted as these.

    Raises:
        ValueError: a model that is not in the catalogue, or was not pulled; `pull` for the small one; what
            `published.pull` raises, without `model` but for places that do not answer.
    """
    console = Console(stderr=True)
    if model not in (None, "small", *DELTAS):
        raise ValueError(f"model must be one of small, {', '.join(DELTAS)}, got {model!r}")
    if pull and model == "small":
        raise ValueError("pull gets a converted model, and model is small: leave one of them out")
    seed = random.randrange(10**6) if seed is None else seed
    if model is not None and model != "small":
        if pull:
            published.pull(model)
        found = _run_real(console, model, tokens or REAL_TOKENS, seed, full)
    else:
        found = _run_small(console, tokens or SMALL_TOKENS, seed)
        if pull and model is None:
            _pull_and_run(console, next(iter(DELTAS)), tokens or REAL_TOKENS, seed, full)
    if not found:
        sys.exit(1)


def _pull_and_run(console: Console, name: str, tokens: int, seed: int, full: bool) -> None:
    print()
    try:
        published.pull(name)
    except NotFetched as error:
        console.print(str(error), highlight=False, soft_wrap=True)
        console.print(f"so {name}, a converted model, is not shown", highlight=False)
        return
    console.print(
        f"{name}, a published model converted to MiniCPM-SALA, beside its original:", highlight=False
    )
    _run_real(console, name, tokens, seed, full)


def _run_small(console: Console, tokens: int, seed: int) -> bool:
    """Whether the answer is right."""
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
    found = _print_answer(question, answer, expected)
    _print_table(result, len(ids), timing, "full attention")
    return found


def _run_real(console: Console, name: str, tokens: int, seed: int, full: bool) -> bool:
    """Whether the answer is right."""
    from transformers import AutoModelForCausalLM

    engine, base = load_engine(name), DELTAS[name].base
    ids, statement, question, expected, depth = hide_number(engine, tokens, random.Random(seed))
    console.print(
        f"{len(ids):,} tokens of the Python Language Reference ({provenance()}); hidden {depth:.0%} deep: "
        f"{statement!r} (seed {seed})",
        highlight=False,
    )
    _introduce(console, engine)
    result = generate(engine, ids, SamplingParams(max_tokens=12), label=f"{name} reads")
    found = _print_answer(question, result.text.strip().partition("\n")[0], expected)
    original = AutoModelForCausalLM.from_pretrained(
        checkpoint_folder(base), dtype=engine.model.dtype, attn_implementation="sdpa"
    ).eval()
    count = original.config.num_hidden_layers
    layers = count if full else min(ORIGINAL_LAYERS, count)
    timing = _time_dense(console, f"{base}, full attention, reads", original, ids, layers)
    _print_table(result, len(ids), timing, base)
    if layers < count:
        print(
            f"{base}: {layers} of its {count} layers were run, each other counted as one of them "
            "(--full runs all)"
        )
    return found


def _print_answer(question: str, answer: str, expected: str) -> bool:
    """Whether it is right; says so."""
    found = expected in answer.replace(",", "")
    verdict = "right" if found else f"wrong: expected {expected}"
    print(f"question: {question}\nanswer:   {answer}   ({verdict})")
    return found


def _introduce(console: Console, engine: Engine) -> None:
    count = sum(p.numel() for p in engine.model.parameters())
    console.print(
        f"model: {count / 1e6:.1f}M parameters, {engine.config.num_hidden_layers} layers; "
        f"threads: {torch.get_num_threads()}",
        highlight=False,
    )


def _time_dense(
    console: Console, label: str, model: Any, ids: list[int], layers: int | None = None
) -> TwinTiming:
    """Time a model with full attention (see `time_layers`; all layers by default), showing its progress by
    layers."""
    count = len(model.model.layers)
    layers = layers or count
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} layers"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(label, total=count if layers == count else 1 + layers)
        step: Callable[[], None] = lambda: bar.advance(task)  # noqa: E731
        return time_layers(model, torch.tensor([ids]), layers, on_layer=step)


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
