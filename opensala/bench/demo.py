"""The demonstration: find a hidden fact in real text, and show what full attention would have cost."""

import random
import sys

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..data.facts import attribute_fact
from ..data.prompts import PromptFormat
from ..data.text import long_document, provenance
from ..engine import Engine, SamplingParams, generate, load_engine
from .twin import TwinTiming, build_dense, time_twin, twin_config


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


def run(tokens: int = 32768, seed: int | None = None) -> None:
    """Run the demonstration and print a table. Exits with code 1 if the answer is wrong."""
    seed = random.randrange(10**6) if seed is None else seed
    console = Console(stderr=True)
    engine = load_engine()
    ids, statement, question, expected, depth = hide_fact(engine, tokens, random.Random(seed))
    count = sum(p.numel() for p in engine.model.parameters())
    console.print(
        f"{len(ids):,} tokens of {provenance()} sources; hidden {depth:.0%} deep: {statement!r} (seed "
        f"{seed})",
        highlight=False,
    )
    console.print(
        f"model: {count / 1e6:.1f}M parameters, {engine.config.num_hidden_layers} layers; "
        f"threads: {torch.get_num_threads()}",
        highlight=False,
    )
    result = generate(engine, ids, SamplingParams(max_tokens=24), label="MiniCPM-SALA reads")
    answer = PromptFormat(engine.tokenizer).answer(result.text)

    twin = build_dense(twin_config(engine.config))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} layers"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("full-attention twin reads", total=len(twin.model.layers))
        timing = time_twin(twin, torch.tensor([ids]), on_layer=lambda: bar.advance(task))

    found = expected in answer
    print(
        f"question: {question}\nanswer:   {answer}   ({'right' if found else f'wrong: expected {expected}'})"
    )
    _print_table(
        result.time_to_first_token,
        result.decode_tokens_per_second or 0.0,
        result.cache_bytes,
        len(ids),
        timing,
    )
    if not found:
        sys.exit(1)


def _print_table(first: float, decode: float, cache: int, tokens: int, twin: TwinTiming) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "MiniCPM-SALA", "full attention", "ratio"):
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
        f"{cache / 2**20:.1f} MiB",
        f"{twin.cache_bytes / 2**20:.1f} MiB",
        f"{twin.cache_bytes / cache:.1f}x",
    )
    Console(file=sys.stdout).print(table)
