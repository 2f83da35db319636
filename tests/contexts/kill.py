"""Kill a process with SIGKILL while it reads into a context, open what it left, go on, compare every bit.

`python -m tests.contexts.kill 50` does it fifty times. The processes are forks of this one, which loads torch
once; it must run with OMP_NUM_THREADS=1.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from opensala.contexts import Context, context, read_manifest
from opensala.contexts.store import verify

from .files import content
from .tools import PARAMS, documents, engine, fork_process, model, outcome

context.SEGMENT_PAGES = 5
FIRST, SECOND = documents(2500), documents(1500, 1, "more.txt")


def ingest(of, path):
    Context.ingest(engine(of), FIRST, path).close()


def extend(of, path):
    with Context.open(engine(of), path, write=True) as kept:
        if len(kept.documents) < 2 or not kept.is_whole:
            kept.extend(SECOND)


def killed(work, of, path, after):
    """Fork a process that works on the path, and kill it after so many seconds; whether it was still at
    it."""
    child = fork_process()
    if not child:
        try:
            work(of, path)
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(rounds):
    of, rng, folder = model(), random.Random(4), Path(tempfile.mkdtemp())
    paths, lengths, wanted = {}, {}, {}
    for work in (ingest, extend):
        path, start = folder / f"{work.__name__}.ctx", time.perf_counter()
        if work is extend:
            shutil.copytree(paths[ingest], path)
        work(of, path)
        paths[work], lengths[work] = path, time.perf_counter() - start
        with Context.open(engine(of), path) as kept:
            wanted[work] = outcome(kept.ask("who?", PARAMS)), content(path)
    hits = partial = 0
    for n in range(rounds):
        work, path = (ingest, extend)[n % 2], folder / "killed.ctx"
        shutil.rmtree(path, ignore_errors=True)
        if work is extend:
            shutil.copytree(paths[ingest], path)
        hits += killed(work, of, path, rng.uniform(0, 1.1 * lengths[work]))
        if path.exists() and (path / "manifest.json").exists():
            verify(path)
            tokens = read_manifest(path).tokens
            assert content(path)[0] == wanted[work][1][0][: 4 * tokens] if tokens else True
            with Context.open(engine(of), path) as kept:
                assert len(kept.tokens) == tokens
                partial += 0 < tokens < kept.manifest.planned
        work(of, path)
        found = content(path)
        assert found == wanted[work][1], f"round {n}: other bits after {work.__name__}"
        running = engine(of)
        with Context.open(running, path) as kept:
            assert outcome(kept.ask("who?", PARAMS)) == wanted[work][0]
        running.check_integrity()
        assert not [p for p in path.iterdir() if p.name.endswith((".partial", ".lock"))]
    shutil.rmtree(folder)
    print(
        f"{rounds} rounds: {hits} killed at work, {partial} of them left a part; all went on to the same bits"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
