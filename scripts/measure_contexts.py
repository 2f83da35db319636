"""What keeping a context costs and saves: the figures of docs/contexts.md.

Reads a document with the shipped model (or finds it read in --context), asks about it anew, reopened, and
reopened with less memory than it has; extends a copy. Each figure is wall-clock seconds, and seconds of
processor time behind it.
"""

import argparse
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensala.contexts import Context
from opensala.contexts.pages import read_tokens
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


def reopened(engine: Engine, path: Path, budget: int | None) -> None:
    engine = Engine(engine.model, engine.tokenizer, engine.options)
    with timed(f"open (budget {budget})", lambda: Context.open(engine, path, host_memory=budget)) as context:
        answer = timed("  first answer", lambda: context.ask(QUESTION))
        print(f"  {answer.text!r}, first token after {answer.time_to_first_token:.2f} s; {context.traffic()}")
        for name in ("128 tokens", "128 tokens again"):
            more = timed(f"  {name}", lambda: context.ask("Tell a story.", LONG))
            print(f"  {more.decode_tokens_per_second:.1f} tokens/s; {context.traffic()}")


def extended(engine: Engine, path: Path) -> None:
    """About 1,000 tokens more, on disk, and the same tokens with everything in memory."""
    copy, more = path.with_name(path.name + ".copy"), [Document("more", long_document(5000, seed=7)[:2900])]
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    running = Engine(engine.model, engine.tokenizer, engine.options)
    with Context.open(running, copy, write=True) as context:
        before = len(context.tokens)
        timed("extend", lambda: context.extend(more))
        tokens = context.tokens
        print(f"  by {len(tokens) - before:,} tokens")
    running = Engine(engine.model, engine.tokenizer, engine.options)
    with Context.open(running, path) as context:
        running.storage.backing.bring(context._hold.pages)
        timed("the same tokens in memory", lambda: read_tokens(running, tokens))
    shutil.rmtree(copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=262144, help="about so many")
    parser.add_argument("--context", type=Path, default=Path("measured.ctx"), help="folder, made if need be")
    parser.add_argument("--anew", action="store_true", help="also read everything anew")
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    engine = load_engine(options=EngineOptions(max_cached_tokens=2 * options.tokens))
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
    for budget in (None, size // 3, size // 30):
        reopened(engine, options.context, budget)
    extended(engine, options.context)


if __name__ == "__main__":
    main()
