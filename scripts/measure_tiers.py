"""A context in less memory than it has: the table of docs/contexts.md on tiers.

Opens a kept context (--context, read first from sources of the Python installation unless it is there) with
everything resident and under budgets, asks the same question of each, which must be answered in the same
bits, and decodes. Rounds are interleaved; rates are the best of them, bytes those of one round. The last line
on stdout is JSON.
"""

import argparse
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensala.bench.record import print_rows, significant
from opensala.contexts import Context
from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, SamplingParams, load_engine

QUESTION = "What is the access code for the north gate?"
LONG = SamplingParams(max_tokens=96, ignore_eos=True)


@dataclass
class Row:
    """One budget: its open context, and what was measured.

    Attributes:
        name: as it is printed.
        part: the context through so much is in memory; 1 for all of it.
        ahead: whether a thread reads ahead; of `part` 1, whether steps are one call.
    """

    name: str
    part: float
    ahead: bool
    context: Context
    rates: list[float] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    at_hand: float = 1.0
    megabytes: float = 0.0  # read from disk in a round

    def found(self, kv_dtype: str) -> dict[str, Any]:
        """A row."""
        return {
            "what": "decoding",
            "kv_dtype": kv_dtype,
            "part": self.part,
            "ahead": self.ahead,
            "tokens_per_second": significant(max(self.rates)),
            "at_hand": significant(self.at_hand),
            "megabytes_per_token": significant(self.megabytes / (LONG.max_tokens or 1)),
        }


def opened(like: Engine, path: Path, whole: int, part: float, ahead: bool) -> Row:
    """A context under a budget of `whole / part` bytes."""
    engine = Engine(like.model, like.tokenizer, like.options)
    if part == 1:
        context = Context.open(engine, path)
        engine.tiers().bring(context._hold.pages)  # type: ignore[union-attr]
        if not ahead:
            runner = engine.runner
            runner.native.reason = runner.graphs.reason = "to see what a step in one call saves"
        return Row("resident" if ahead else "resident, layer by layer", part, ahead, context)
    context = Context.open(engine, path, host_memory=int(whole / part))
    if not ahead:
        engine.tiers().ahead.room = 0
    name = f"{whole / part / 1e6:.1f} MB{'' if ahead else ', nothing read ahead'}"
    return Row(name, part, ahead, context)


def decoded(context: Context) -> float:
    """Tokens a second behind the first one, of an answer that does not end."""
    engine = context.engine
    engine.add(context._prompt("Tell a story."), LONG)
    times = []
    while engine.has_work:
        events = engine.step()
        times += [time.perf_counter()] * sum(event.token is not None for event in events)
    return (len(times) - 1) / (times[-1] - times[0])


def measure(row: Row) -> None:
    """One round of a row."""
    tiers = row.context.engine.tiers()
    before = tiers.stats()
    rate = decoded(row.context)
    n = {key: value - before[key] for key, value in tiers.stats().items()}
    wanted = n["host_hits"] + n["host_misses"]
    row.at_hand = n["host_hits"] / wanted if wanted else 1.0
    row.megabytes = n["disk_bytes_read"] / 1e6
    here = f"{row.at_hand:.1%} of {wanted:,}" if wanted else "all"
    row.rates.append(rate)
    row.moved.append(
        f"{row.megabytes:.2f} MB read, {here} at hand, {n['pages_read_ahead_used']} of "
        f"{n['pages_read_ahead']} read ahead used"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=136_000, help="of a context that is not there, about")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument(
        "--parts", type=float, nargs="+", default=[3, 30, 80], help="the context through so much"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    room = max(300_000, 2 * options.tokens)
    like = load_engine(options=EngineOptions(max_cached_tokens=room, kv_dtype=options.kv_dtype))
    if not options.context.exists():
        document = Document("sources", long_document(int(options.tokens * 2.9)))
        Context.ingest(like, [document], options.context).close()
    rows = [opened(like, options.context, 0, 1, ahead) for ahead in (True, False)]
    tiers = rows[0].context.engine.tiers()
    whole = len(rows[0].context._hold.pages) * len(tiers.layers) * tiers.page_bytes  # type: ignore[union-attr]
    print(f"{len(rows[0].context.tokens):,} tokens, keys and values {whole:,} bytes")
    rows += [
        opened(like, options.context, whole, part, ahead) for part in options.parts for ahead in (True, False)
    ]
    answers = {row.name: row.context.ask(QUESTION) for row in rows}
    bits = {(a.text, a.confidence, a.least_confidence) for a in answers.values()}
    print(f"{len(bits)} answer(s): {next(iter(bits))}", flush=True)
    for _ in range(options.rounds):
        for row in rows:
            measure(row)
    for row in rows:
        rates = ", ".join(f"{rate:.0f}" for rate in row.rates)
        print(f"{row.name}: {max(row.rates):.0f} tokens/s ({rates}); {row.moved[-1]}")
    print_rows([row.found(options.kv_dtype) for row in rows])


if __name__ == "__main__":
    main()
