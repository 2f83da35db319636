"""Damage and kills in full count: what docs/contexts.md promises of a context's files.

Changes single bytes all over the files of a context of the shipped model, cuts files short, and each time
checks the context as a whole and asks it: nothing that was changed may pass the check, and no answer may
differ. Then kills processes that read into a context and extend it (tests/contexts/kill.py). It ends with 1
if anything passed. Run it from the source tree.
"""

import argparse
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from opensala.contexts import Context
from opensala.contexts.store import verify
from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, load_engine

FACT = "\nThe access code for the north gate is 48213.\n"
QUESTION = "What is the access code for the north gate?"


def damages(files: dict[str, bytes], flips: int, cuts: int) -> Iterator[tuple[str, str, bytes]]:
    """What was done, to which file, and its bytes since."""
    rng, names = random.Random(0), sorted(files)
    sizes = [len(files[name]) for name in names]
    for n in range(flips):  # every other time any file alike, so that small ones get their share
        name = rng.choices(names, sizes)[0] if n % 2 else rng.choice(names)
        data = bytearray(files[name])
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        yield "flipped", name, bytes(data)
    for _ in range(cuts):
        name = rng.choice(names)
        yield "cut short", name, files[name][: rng.randrange(len(files[name]))]


def damage(engine: Engine, folder: Path, flips: int, cuts: int, ask_every: int) -> Counter:
    """How often each outcome came; keys are what was done and what came of it."""

    def answer() -> tuple[str, float | None]:
        running = Engine(engine.model, engine.tokenizer, engine.options)
        with Context.open(running, folder) as context:
            result = context.ask(QUESTION)
            return result.text, result.confidence

    wanted, found = answer(), Counter[str]()
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
    for number, (what, name, data) in enumerate(damages(files, flips, cuts)):
        (folder / name).write_bytes(data)
        try:
            verify(folder)
            found[f"{what}: PASSED THE CHECK"] += 1
        except ValueError as error:
            found[f"{what}: found by the check" if str(folder) in str(error) else "UNNAMED"] += 1
        if number % ask_every == 0:
            try:
                found[f"{what}: not touched, same answer" if answer() == wanted else "WRONG ANSWER"] += 1
            except ValueError:
                found[f"{what}: refused when asked"] += 1
        (folder / name).write_bytes(files[name])
    assert answer() == wanted, "the context is whole again"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument(
        "--ask-every", type=int, default=1, help="damages that the context is also asked with"
    )
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    engine = load_engine(options=EngineOptions(max_cached_tokens=20_000))
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name) / "a.ctx", long_document(24_000, seed=3)[:24_000]
        with Context.ingest(engine, [Document("a", text[:9000] + FACT + text[9000:])], folder) as context:
            context.extend([Document("b", long_document(6000, seed=4)[:6000])])
            print(f"{len(context.tokens):,} tokens, {context.manifest.num_bytes:,} bytes")
        found = damage(engine, folder, options.flips, options.cuts, options.ask_every)
        shutil.rmtree(folder)
    for what, count in sorted(found.items()):
        print(f"{count:5} {what}", flush=True)
    if options.kills:
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "tests.contexts.kill", str(options.kills)]
        subprocess.run(words, cwd=Path(__file__).parents[1], env=one_thread, check=True)
    sys.exit(any(what.isupper() or "PASSED" in what for what in found))


if __name__ == "__main__":
    main()
