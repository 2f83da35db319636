"""Measure the engine on this machine: decoding alone and together, one document asked often, drafts.

    python scripts/measure_engine.py [--tokens 65536] [--kv-dtype int8]
    python scripts/measure_engine.py --model smollm2-135m-sala --tokens 0

Each figure is a ratio of two things timed in one run, in turns. Rows are added to benchmarks/engine.csv; the
last line on stdout is JSON.
"""

import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from opensala.bench.record import append_rows, print_rows, significant
from opensala.data.needles import needle_document
from opensala.data.text import long_document
from opensala.engine import Engine, EngineOptions, SamplingParams, load_engine

ROWS = Path(__file__).parents[1] / "benchmarks" / "engine.csv"
CONTEXTS, STEPS, ROUNDS = "100,1000,3000,8000", 40, 3  # from 4,096 on the shipped model attends sparsely


@dataclass
class Notes:
    """Figures of a run: in the CSV file at once, and as rows for the last line."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, figure: float, unit: str, detail: str, **more: Any) -> None:
        """Print a figure and add it to both; `more` goes into the row for the last line."""
        print(f"{what}: {figure:.3g} {unit} ({detail})", flush=True)
        self.rows.append({"what": what, "figure": significant(figure), "unit": unit, **more})
        row = {
            "what": what,
            "figure": f"{figure:.4g}",
            "unit": unit,
            "detail": detail,
            "date": time.strftime("%Y-%m-%d"),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        append_rows(self.path, list(row), [row])


def seconds_per_step(engine: Engine, sequences: int, context: int, rng: random.Random) -> float:
    """Median time of a decoding step of so many sequences, each with so many tokens before it."""
    for _ in range(sequences):
        prompt = [rng.randrange(3, engine.config.vocab_size) for _ in range(context)]
        engine.add(prompt, SamplingParams(max_tokens=STEPS + 20, ignore_eos=True))
    while any(sequence.is_reading for sequence in engine.scheduler.sequences()):
        engine.step()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    while engine.has_work:
        engine.step()
    return statistics.median(times)


def together(notes: Notes, engine: Engine, context: int, model: str | None) -> None:
    """Eight sequences in one step, against one alone."""
    rng = random.Random(0)
    found: dict[int, list[float]] = {1: [], 8: []}
    for _ in range(ROUNDS):
        for count, times in found.items():
            times.append(seconds_per_step(engine, count, context, rng))
    one, eight = (statistics.median(times) for times in found.values())
    kept = "" if engine.options.kv_dtype == "auto" else f", keys and values in {engine.options.kv_dtype}"
    behind = f"{context:,} tokens of context{kept}" + (f", {model}" if model else "")
    notes.add("decoding step, one sequence", 1e3 * one, "ms", behind, context=context)
    rates = f"{1 / one:.0f} and {8 / eight:.0f} tokens/s"
    notes.add(
        "tokens/s of 8 sequences over one",
        8 * one / eight,
        "times",
        f"{behind}: {rates}",
        context=context,
        tokens_per_second=significant(8 / eight),
    )


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def asked_often(notes: Notes, engine: Engine, tokens: int) -> None:
    """Ten questions about one document, against reading it once."""
    rng, ratios, last, params = random.Random(1), [], "", SamplingParams(max_tokens=12)
    for n in range(3):
        document = needle_document(engine.tokenizer, long_document(6 * tokens, seed=n), tokens, 10, rng)
        prompts = [document.ids + trial.question for trial in document.trials]
        engine.scheduler.tree.clear()
        once = clock(lambda ids=document.ids: engine.generate([ids], SamplingParams(max_tokens=1)))
        engine.scheduler.tree.clear()
        ten = clock(lambda prompts=prompts: engine.generate(prompts, params))
        ratios.append(ten / once)
        last = f"{len(document.ids):,} tokens, {once:.1f} s to read, {ten:.1f} s with ten answers"
    notes.add("ten questions over reading once", statistics.median(ratios), "times", last)


def drafts(notes: Notes, engine: Engine) -> None:
    """Text that repeats what stands before it, with and without drafts."""
    source = long_document(12_000, seed=3)
    prompt = engine.encode(source + source[:9000])
    times: dict[int, list[float]] = {0: [], 8: []}
    done = None
    for _ in range(ROUNDS):
        for most, spent in times.items():
            params = SamplingParams(max_tokens=100, ignore_eos=True, speculate=most)
            engine.scheduler.tree.clear()
            engine.add(prompt, params)
            while any(sequence.is_reading for sequence in engine.scheduler.sequences()):
                engine.step()
            start = time.perf_counter()
            while engine.has_work:
                for event in engine.step():
                    done = event.completion or done
            spent.append(time.perf_counter() - start)
    plain, guessed = (statistics.median(spent) for spent in times.values())
    assert done is not None, "the last one was with drafts"
    notes.add(
        "decoding with drafts over without",
        plain / guessed,
        "times",
        f"{done.accepted} of {done.drafted} accepted",
    )


def main(
    model: Annotated[str | None, typer.Option(help="Checkpoint; the shipped one by default.")] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens of the document that is asked often; 0 for steps alone.")
    ] = 65536,
    kv_dtype: Annotated[
        str, typer.Option(help="How keys and values are kept: auto, float32, bfloat16, int8.")
    ] = "auto",
    contexts: Annotated[str, typer.Option(help="Tokens behind which steps are timed.")] = CONTEXTS,
    rows: Annotated[Path, typer.Option(help="CSV file the figures are added to.")] = ROWS,
) -> None:
    options = EngineOptions(max_cached_tokens=3 * tokens + 100_000, kv_dtype=kv_dtype)
    engine, notes = load_engine(model, options=options), Notes(rows)
    for context in contexts.split(","):
        together(notes, engine, int(context), model)
    if tokens:
        drafts(notes, engine)
        asked_often(notes, engine, tokens)
    print_rows(notes.rows)


if __name__ == "__main__":
    typer.run(main)
