"""Kept contexts beside llama.cpp's slot files: the table of docs/contexts.md.

A dense model in llama.cpp and a hybrid of the same size here read the same text, save what they remember,
restore it in a fresh engine and go on. Then the file is changed, and the weights. It needs llama-cpp-python
(pip install llama-cpp-python) and two checkpoints:

    python scripts/compare_llama.py --gguf SmolLM2-135M-Instruct.gguf --model smollm2-135m-sala

The last line on stdout is JSON.
"""

import argparse
import ctypes
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from opensala.bench.record import print_rows, significant
from opensala.contexts import Context
from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, SamplingParams, load_engine

QUESTION, NEW = "What is this text about?", 8
FLIPS = 24


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


class Dense:
    """A model in llama.cpp, and slot files as its server writes them."""

    def __init__(self, path: Path, tokens: int, threads: int) -> None:
        room = tokens + 64
        self.llm = llama_cpp.Llama(str(path), n_ctx=room, n_threads=threads, verbose=False)
        self.context = self.llm._ctx.ctx

    def read(self, ids: list[int]) -> None:
        self.llm.reset()
        self.llm.eval(ids)

    def go_on(self, last: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens behind what was read and the token `last`, and the logits of the first of them."""
        found, first, token = [], None, last
        for _ in range(NEW):
            self.llm.eval([token])
            place = llama_cpp.llama_get_logits_ith(self.context, -1)
            logits = np.ctypeslib.as_array(place, (self.llm.n_vocab(),)).copy()
            first = logits if first is None else first
            found.append(token := int(logits.argmax()))
        assert first is not None, "at least one token"
        return found, first

    def save(self, path: Path, ids: list[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        assert llama_cpp.llama_state_seq_save_file(self.context, str(path).encode(), 0, array, len(ids))

    def restore(self, path: Path, ids: list[int]) -> bool:
        """Whether the file was accepted."""
        self.llm.reset()
        array, count = (llama_cpp.llama_token * len(ids))(), ctypes.c_size_t()
        size = llama_cpp.llama_state_seq_load_file(
            self.context, str(path).encode(), 0, array, len(ids), ctypes.byref(count)
        )
        self.llm.n_tokens = count.value
        return bool(size) and count.value == len(ids)


def changed(source: Path, target: Path, rng: random.Random, trial: int) -> None:
    """A copy with one byte changed, every fourth time with 64 bytes zeroed."""
    data = bytearray(source.read_bytes())
    place = rng.randrange(len(data) - 64)
    if trial % 4:
        data[place] ^= rng.randrange(1, 256)
    else:
        data[place : place + 64] = bytes(64)
    target.write_bytes(data)


@dataclass(frozen=True)
class Found:
    """What came out for one of both: lines of the table, and seconds for the last line on stdout."""

    lines: dict[str, str]
    seconds: dict[str, float]


def dense(options: argparse.Namespace, text: str, folder: Path) -> Found:
    model = Dense(options.gguf, options.tokens, options.threads)
    ids = model.llm.tokenize(text.encode())[: options.tokens]
    *ids, last = ids
    reading, _ = timed(lambda: model.read(ids))
    slot = folder / "slot.bin"
    saving, _ = timed(lambda: model.save(slot, ids))
    wanted = model.go_on(last)
    fresh = Dense(options.gguf, options.tokens, options.threads)
    restoring, accepted = timed(lambda: fresh.restore(slot, ids))
    first, found = timed(lambda: fresh.go_on(last))
    assert accepted
    rng, used, other = random.Random(0), 0, 0
    for trial in range(FLIPS):
        changed(slot, folder / "bad.bin", rng, trial)
        if fresh.restore(folder / "bad.bin", ids):
            used += 1
            other += not np.array_equal(fresh.go_on(last)[1], wanted[1])
    swapped = bytearray(options.gguf.read_bytes())
    place = len(swapped) // 2
    swapped[place : place + 4096] = random.Random(1).sample(swapped[place : place + 4096], 4096)
    (folder / "other.gguf").write_bytes(swapped)
    another = Dense(folder / "other.gguf", options.tokens, options.threads)
    taken = another.restore(slot, ids)
    lines = {
        "tokens read": f"{len(ids):,} in {reading:.1f} s",
        "bytes per token": f"{slot.stat().st_size / len(ids):,.0f}",
        "save": f"{saving:.2f} s",
        "restore, then the next token": f"{restoring:.2f} s + {first / NEW:.2f} s",
        "goes on as if it had never stopped": str(
            found[0] == wanted[0] and np.array_equal(found[1], wanted[1])
        ),
        "other weights": "accepted" if taken else "refused",
        f"{FLIPS} changed files": f"{used} accepted, {other} of them with other logits",
    }
    return Found(lines, {"reading": reading, "save": saving, "restore": restoring, "first": first / NEW})


def hybrid(options: argparse.Namespace, text: str, folder: Path) -> Found:
    bounds = EngineOptions(max_cached_tokens=2 * options.tokens + 4096)
    engine = load_engine(options.model, dtype=options.dtype, options=bounds)
    params, path = SamplingParams(max_tokens=NEW, ignore_eos=True), folder / "kept.ctx"
    cut = engine.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    documents = [Document("text", text[: cut[options.tokens - 1][1]])]

    def new() -> Engine:
        return Engine(engine.model, engine.tokenizer, engine.options)

    def answer(context: Context) -> tuple[str, float | None]:
        result = context.ask(QUESTION, params)
        return result.text, result.confidence

    reading, context = timed(lambda: Context.ingest(new(), documents))
    saving, _ = timed(lambda: context.save(path))
    tokens, size, wanted = len(context.tokens), context.manifest.num_bytes, answer(context)
    context.close()
    restoring, context = timed(lambda: Context.open(new(), path))
    result = context.ask(QUESTION, params)
    first = result.time_to_first_token
    context.close()
    rng, used, other, refused = random.Random(0), 0, 0, ""
    files = sorted(p for p in path.iterdir() if p.name != ".lock")
    for trial in range(FLIPS):
        bad = folder / "bad.ctx"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(path, bad)
        name = rng.choices(files, [p.stat().st_size for p in files])[0].name
        changed(path / name, bad / name, rng, trial)
        try:
            with Context.open(new(), bad) as context:
                other += answer(context) != wanted
                used += 1
        except ValueError as error:
            refused = str(error)
    assert "damaged" in refused, refused
    with torch.no_grad():
        next(iter(engine.model.parameters())).view(-1)[0] += 1e-3
    try:
        Context.open(new(), path).close()
        taken = "accepted"
    except ValueError as error:
        taken = f"refused: {str(error).split(': ', 2)[-1].split('.')[0]}"
    lines = {
        "tokens read": f"{tokens:,} in {reading:.1f} s",
        "bytes per token": f"{size / tokens:,.0f}",
        "save": f"{saving:.2f} s",
        "restore, then the next token": f"{restoring:.2f} s + {first:.2f} s (with a question)",
        "goes on as if it had never stopped": str((result.text, result.confidence) == wanted),
        "other weights": taken,
        f"{FLIPS} changed files": f"{used} accepted, {other} of them with another answer",
    }
    return Found(lines, {"reading": reading, "save": saving, "restore": restoring, "first": first})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the dense model")
    parser.add_argument(
        "--model", required=True, help="a hybrid of its size: folder, hub name or pulled model"
    )
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp; OMP_NUM_THREADS is ours")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    text = long_document(8 * options.tokens, seed=3)
    with tempfile.TemporaryDirectory() as name:
        theirs, ours = dense(options, text, Path(name)), hybrid(options, text, Path(name))
    print("| | llama.cpp | OpenSALA |\n|---|---|---|")
    for line in theirs.lines:
        print(f"| {line} | {theirs.lines[line]} | {ours.lines[line]} |")
    rows = [("llama.cpp", theirs), ("OpenSALA", ours)]
    print_rows([{"model": n} | {k: significant(v) for k, v in found.seconds.items()} for n, found in rows])


if __name__ == "__main__":
    main()
