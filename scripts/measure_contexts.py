"""What keeping a context costs and saves: the figures of docs/contexts.md.

Reads a document with the shipped model (or finds it read in --context), asks about it anew, reopened, and
reopened with less memory than it has; extends copies, each time beside the same tokens with everything in
memory. Each figure is wall-clock seconds, and seconds of processor time behind it. --opening measures only
what opening a context that is there costs.
"""

import argparse
import logging
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensala.contexts import Context
from opensala.contexts.backing import DiskBacking
from opensala.contexts.pages import read_tokens
from opensala.contexts.store import fork
from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, SamplingParams, ask, load_engine

FACT = "\nThe access code for the north gate is 48213.\n"
QUESTION = "What is the access code for the north gate?"
LONG = SamplingParams(max_tokens=128, ignore_eos=True)


def timed(name: str, work: Callable[[], Any]) -> Any:
    wall, used = time.perf_counter(), time.process_time()
    result = work()
    print(f"{name}: {time.perf_counter() - wall:.2f} s ({time.process_time() - used:.2f})", flush=True)
    return result


def opened(engine: Engine, path: Path) -> None:
    """Opening, and the first token of an answer; bytes read for each."""
    engine = Engine(engine.model, engine.tokenizer, engine.options)
    backing, start = DiskBacking.of(engine), time.perf_counter()
    with timed("open", lambda: Context.open(engine, path)) as context:
        opening, read = time.perf_counter() - start, backing.counter.bytes
        answer = context.ask(QUESTION)
        whole = opening + answer.time_to_first_token
        print(f"  {answer.text!r} about {len(context.tokens):,} tokens; first token {whole:.2f} s after the")
        print(f"  beginning; {read:,} bytes read at opening, {backing.counter.bytes:,} with the answer, of")
        print(f"  {context.manifest.num_bytes:,}", flush=True)


def bounded(engine: Engine, path: Path, budget: int | None) -> None:
    engine = Engine(engine.model, engine.tokenizer, engine.options)
    with timed(f"open (budget {budget})", lambda: Context.open(engine, path, host_memory=budget)) as context:
        answer = timed("  first answer", lambda: context.ask(QUESTION))
        print(f"  {answer.text!r}, first token after {answer.time_to_first_token:.2f} s; {context.traffic()}")
        for name in ("128 tokens", "128 tokens again"):
            more = timed(f"  {name}", lambda: context.ask("Tell a story.", LONG))
            print(f"  {more.decode_tokens_per_second:.1f} tokens/s; {context.traffic()}")


def used(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def extended(engine: Engine, path: Path, rounds: int) -> None:
    """About 1,000 tokens more, on disk, right after opening and again, each beside the same tokens with
    everything in memory: seconds of processor time."""
    copy, text = path.with_name(path.name + ".copy"), long_document(10_000 * rounds, seed=7)
    parts = iter([Document("more", text[2900 * n : 2900 * (n + 1)]) for n in range(2 * rounds)])
    seconds: dict[str, list[float]] = {"first": [], "first in memory": [], "next": [], "next in memory": []}
    for _ in range(rounds):
        shutil.rmtree(copy, ignore_errors=True)
        fork(path, copy)
        disk, memory = (Engine(engine.model, engine.tokenizer, engine.options) for _ in range(2))
        with Context.open(disk, copy, write=True) as context, Context.open(memory, path) as beside:
            memory.storage.backing.bring(beside._hold.pages)
            for name in ("first", "next"):
                more = [next(parts)]
                seconds[name].append(used(lambda c=context, m=more: c.extend(m))[0])
                tokens = context.tokens
                took, hold = used(lambda e=memory, t=tokens: read_tokens(e, t))
                seconds[f"{name} in memory"].append(took)
                memory.scheduler.let_go(hold)
    shutil.rmtree(copy)
    for name, each in seconds.items():
        print(f"extend, {name}: median {statistics.median(each):.3f} s of {[round(x, 3) for x in each]}")
    for name in ("first", "next"):
        ratio = statistics.median(seconds[name]) / statistics.median(seconds[f"{name} in memory"])
        print(f"  {name}: {ratio:.2f} times the work in memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=262144, help="about so many")
    parser.add_argument("--context", type=Path, default=Path("measured.ctx"), help="folder, made if need be")
    parser.add_argument("--anew", action="store_true", help="also read everything anew")
    parser.add_argument("--opening", action="store_true", help="only open --context and ask")
    parser.add_argument("--rounds", type=int, default=5, help="of extending")
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    engine = load_engine(options=EngineOptions(max_cached_tokens=2 * options.tokens))
    if options.opening:
        opened(engine, options.context)
        return
    text = long_document(int(options.tokens * 2.9))
    documents = [Document("d", text[: len(text) // 3] + FACT + text[len(text) // 3 :])]
    if not options.context.exists():
        timed("ingest", lambda: Context.ingest(engine, documents, options.context).close())
    with Context.open(engine, options.context) as context:
        count, size = len(context.tokens), context.manifest.num_bytes
    print(f"{count:,} tokens, {size:,} bytes, {size / count:.0f} a token")
    if options.anew:
        fresh = Engine(engine.model, engine.tokenizer, engine.options)
        answer = timed("anew", lambda: ask(fresh, documents, QUESTION, quiet=True))
        print(f"  {answer.text!r}, first token after {answer.time_to_first_token:.2f} s")
    opened(engine, options.context)
    for budget in (size // 3, size // 30):
        bounded(engine, options.context, budget)
    extended(engine, options.context, options.rounds)


if __name__ == "__main__":
    main()
