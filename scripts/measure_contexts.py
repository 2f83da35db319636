"""What keeping a context costs and saves: the figures of docs/contexts.md.

Reads a document with the shipped model (or finds it read in --context), asks about it anew, reopened, and
reopened with less memory than it has; extends copies, each time beside the same tokens with everything in
memory. Each figure is wall-clock seconds, and seconds of processor time behind it. --opening measures only
what opening a context that is there costs, --extending only what extending it does, --ingesting only reading
and writing, with all keys and values in memory and with so many bytes of them. The last line on stdout is
JSON.
"""

import argparse
import logging
import mmap
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensala.bench.record import print_rows, significant
from opensala.contexts import Context
from opensala.contexts.pages import read_tokens
from opensala.contexts.store import fork
from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, SamplingParams, ask, load_engine

FACT = "\nThe access code for the north gate is 48213.\n"
QUESTION = "What is the access code for the north gate?"
LONG = SamplingParams(max_tokens=128, ignore_eos=True)
FRESH = False  # set by --fresh
_AT_HAND = 256 << 20  # bytes
ROWS: list[dict[str, Any]] = []  # for the last line


def keep(what: str, **figures: float) -> None:
    """A row."""
    ROWS.append({"what": what, **{name: significant(value) for name, value in figures.items()}})


def timed(name: str, work: Callable[[], Any]) -> Any:
    wall, used = time.perf_counter(), time.process_time()
    result = work()
    wall, used = time.perf_counter() - wall, time.process_time() - used
    print(f"{name}: {wall:.2f} s ({used:.2f})", flush=True)
    keep(name.strip(), seconds=wall, processor_seconds=used)
    return result


def opened(engine: Engine, path: Path) -> None:
    """Opening, and the first token of an answer; bytes read for each."""
    engine = Engine(engine.model, engine.tokenizer, engine.options)
    backing, start = engine.tiers(), time.perf_counter()
    with timed("open", lambda: Context.open(engine, path)) as context:
        opening, read = time.perf_counter() - start, backing.counter.bytes
        answer = context.ask(QUESTION)
        whole = opening + answer.time_to_first_token
        print(f"  {answer.text!r} about {len(context.tokens):,} tokens; first token {whole:.2f} s after the")
        print(f"  beginning; {read:,} bytes read at opening, {backing.counter.bytes:,} with the answer, of")
        print(f"  {context.manifest.num_bytes:,}", flush=True)
        keep("first token", seconds=whole)


def bounded(engine: Engine, path: Path, budget: int | None) -> None:
    engine = Engine(engine.model, engine.tokenizer, engine.options)
    with timed(f"open (budget {budget})", lambda: Context.open(engine, path, host_memory=budget)) as context:
        answer = timed("  first answer", lambda: context.ask(QUESTION))
        print(f"  {answer.text!r}, first token after {answer.time_to_first_token:.2f} s; {context.traffic()}")
        for name in ("128 tokens", "128 tokens again"):
            more = timed(f"  {name}", lambda: context.ask("Tell a story.", LONG))
            print(f"  {more.decode_tokens_per_second:.1f} tokens/s; {context.traffic()}")
            keep(f"decoding, {name}, budget {budget}", tokens_per_second=more.decode_tokens_per_second or 0.0)


def used(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time, and what came of it.

    A virtual machine's host takes memory back that is free for a while, and gives it again page by page. That
    counts as the guest's time, and is several times what a first use of memory costs otherwise. So that it
    is not measured, free memory is used a moment before (unless FRESH).
    """
    if not FRESH:
        some = mmap.mmap(-1, _AT_HAND)
        some.madvise(mmap.MADV_NOHUGEPAGE)
        some.write(bytes(_AT_HAND))
        some.close()
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def extended(engine: Engine, path: Path, rounds: int) -> None:
    """About 1,000 tokens more, on disk, right after opening and again, each beside the same tokens with
    everything in memory, in turn the one and the other first: seconds of processor time. A round before
    the others is not counted: it makes the process's work memory."""
    copy, text = path.with_name(path.name + ".copy"), long_document(2400 * 2 * (rounds + 1), seed=7)
    parts = iter([Document("more", text[2400 * n : 2400 * (n + 1)]) for n in range(2 * rounds + 2)])
    seconds: dict[str, list[tuple[float, float]]] = {"first": [], "next": []}
    for turn in range(-1, rounds):
        shutil.rmtree(copy, ignore_errors=True)
        fork(path, copy)
        disk, memory = (Engine(engine.model, engine.tokenizer, engine.options) for _ in range(2))
        with Context.open(disk, copy, write=True) as context, Context.open(memory, path) as beside:
            memory.tiers().bring(beside._hold.pages if beside._hold else [])
            for each in seconds.values():
                pair = both(context, memory, [next(parts)], disk_first=turn % 2 == 0)
                each += [pair] if turn >= 0 else []
    shutil.rmtree(copy)
    for name, each in seconds.items():
        kept, held = (statistics.median(x) for x in zip(*each, strict=True))
        ratios = [a / b for a, b in each]
        print(f"extend, {name}: median {kept:.3f} s, in memory {held:.3f} s, {kept / held:.2f} times;")
        keep(f"extend, {name}", ratio=kept / held, pairs=statistics.median(ratios))
        print(f"  of pairs {statistics.median(ratios):.2f}: {[round(x, 2) for x in ratios]}", flush=True)


def both(context: Context, memory: Engine, more: list[Document], disk_first: bool) -> tuple[float, float]:
    """Extend a context on disk, and read the same tokens with an engine that has its text in memory."""
    found = context.wording.longer(context.tokens, context.tail, context.wording.joined([[], more]))
    assert found is not None, "the longer text goes on behind what was read"

    def on_disk() -> float:
        return used(lambda: context.extend(more))[0]

    def in_memory() -> float:
        took, hold = used(lambda: read_tokens(memory, found[0]))
        memory.scheduler.holds.let_go(hold)
        return took

    if disk_first:
        return on_disk(), in_memory()
    held = in_memory()
    return on_disk(), held


def main() -> None:
    global FRESH
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=262144, help="about so many")
    parser.add_argument("--context", type=Path, default=Path("measured.ctx"), help="folder, made if need be")
    parser.add_argument("--anew", action="store_true", help="also read everything anew")
    parser.add_argument("--opening", action="store_true", help="only open --context and ask")
    parser.add_argument("--extending", action="store_true", help="only extend copies of --context")
    parser.add_argument(
        "--ingesting", type=int, metavar="BYTES", help="only ingest, without and with a bound"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of extending")
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[3, 30], help="budgets: the size through so much"
    )
    parser.add_argument("--fresh", action="store_true", help="also measure a host that gives memory again")
    options = parser.parse_args()
    FRESH = options.fresh
    logging.getLogger("opensala").setLevel(logging.ERROR)
    engine = load_engine(options=EngineOptions(max_cached_tokens=2 * options.tokens + 8192))
    if options.opening:
        opened(engine, options.context)
    elif options.extending:
        extended(engine, options.context, options.rounds)
    elif options.ingesting:
        ingested(engine, options)
    else:
        everything(engine, options)
    print_rows(ROWS)


def documents_of(tokens: int) -> list[Document]:
    """One of about so many tokens, the fact in it."""
    text = long_document(int(tokens * 2.9))
    return [Document("d", text[: len(text) // 3] + FACT + text[len(text) // 3 :])]


def ingested(engine: Engine, options: argparse.Namespace) -> None:
    """Ingest without a bound and with one, which must come to the same bytes."""
    documents, sizes = documents_of(options.tokens), set()
    for name, budget in (("ingest", None), ("ingest, bounded", options.ingesting)):
        engine = Engine(engine.model, engine.tokenizer, engine.options)
        path = options.context.with_name(f"{options.context.name}.{name.partition(', ')[2] or 'whole'}")
        with timed(
            name, lambda e=engine, p=path, b=budget: Context.ingest(e, documents, p, host_memory=b)
        ) as made:
            sizes.add(made.manifest.num_bytes)
    assert len(sizes) == 1, sizes


def everything(engine: Engine, options: argparse.Namespace) -> None:
    """Ingest, open, ask with less memory, extend."""
    documents = documents_of(options.tokens)
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
    for part in options.parts:
        bounded(engine, options.context, size // part)
    extended(engine, options.context, options.rounds)


if __name__ == "__main__":
    main()
