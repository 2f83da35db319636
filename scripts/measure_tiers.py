"""A context in less memory than it has: the table of docs/contexts.md on tiers.

Opens a kept context (--context, made by `opensala ingest` with the same --kv-dtype) with everything resident
and under budgets, asks the same question of each, which must be answered in the same bits, and decodes.
Rounds are interleaved; rates are the best of them, bytes those of one round.
"""

import argparse
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from opensala.contexts import Context
from opensala.engine import Engine, EngineOptions, SamplingParams, load_engine

QUESTION = "What is the access code for the north gate?"
LONG = SamplingParams(max_tokens=96, ignore_eos=True)


@dataclass
class Row:
    """One budget: its open context, and what was measured."""

    name: str
    context: Context
    rates: list[float] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)


def opened(like: Engine, path: Path, name: str, budget: int | None, ahead: bool = True) -> Row:
    engine = Engine(like.model, like.tokenizer, like.options)
    context = Context.open(engine, path, host_memory=budget)
    if budget is None:
        engine.tiers().bring(context._hold.pages)  # type: ignore[union-attr]
    elif not ahead:
        engine.tiers().ahead.room = 0
    return Row(name, context)


def decoded(context: Context) -> float:
    """Tokens a second behind the first one, of an answer that does not end."""
    engine = context.engine
    engine.add(context._prompt("Tell a story."), LONG)
    times = []
    while engine.has_work:
        events = engine.step()
        times += [time.perf_counter()] * sum(event.token is not None for event in events)
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=Path, required=True)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument(
        "--parts", type=float, nargs="+", default=[3, 30, 80], help="the context through so much"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    like = load_engine(options=EngineOptions(max_cached_tokens=300_000, kv_dtype=options.kv_dtype))
    names = ("resident", "resident, layer by layer")
    rows = [opened(like, options.context, name, None) for name in names]
    rows[1].context.engine.runner.graphs.reason = "to see what recorded steps save"
    tiers = rows[0].context.engine.tiers()
    whole = len(rows[0].context._hold.pages) * len(tiers.layers) * tiers.page_bytes  # type: ignore[union-attr]
    print(f"{len(rows[0].context.tokens):,} tokens, keys and values {whole:,} bytes")
    for part in options.parts:
        for ahead in (True, False):
            name = f"{whole / part / 1e6:.1f} MB{'' if ahead else ', nothing read ahead'}"
            rows.append(opened(like, options.context, name, int(whole / part), ahead))
    answers = {row.name: row.context.ask(QUESTION) for row in rows}
    bits = {(a.text, a.confidence, a.least_confidence) for a in answers.values()}
    print(f"{len(bits)} answer(s): {next(iter(bits))}", flush=True)
    for _ in range(options.rounds):
        for row in rows:
            before = row.context.engine.tiers().stats()
            rate = decoded(row.context)
            after = row.context.engine.tiers().stats()
            n = {key: after[key] - before[key] for key in after}
            wanted = n["host_hits"] + n["host_misses"]
            here = f"{n['host_hits'] / wanted:.1%} of {wanted:,}" if wanted else "all"
            row.rates.append(rate)
            row.moved.append(
                f"{n['disk_bytes_read'] / 1e6:.2f} MB read, {here} at hand, {n['pages_read_ahead_used']} of "
                f"{n['pages_read_ahead']} read ahead used"
            )
    for row in rows:
        rates = ", ".join(f"{rate:.0f}" for rate in row.rates)
        print(f"{row.name}: {max(row.rates):.0f} tokens/s ({rates}); {row.moved[-1]}")


if __name__ == "__main__":
    main()
