"""A contender in a process of its own, told by lines of JSON on stdin what to do; answers on stdout.

python -m opensala.bench.speed.worker KIND PRESET WEIGHTS DEVICE

`{"op": "start", "tokens": T, "new": N}`, `{"op": "read", "count": C}`, `{"op": "decode", "count": C}`,
`{"op": "parts", "count": C}`, `{"op": "end"}`. The protocol is that of `llama_worker.py`, which cannot share
code with this file: it runs in another environment.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...engine.memory import peak_bytes
from .contenders import Dense, Hybrid
from .presets import preset


def main(kind: str, name: str, weights: str, device: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no reply
    where = torch.device(device)
    made: type[Hybrid | Dense] = Hybrid if kind == "hybrid" else Dense
    contender = made(preset(name), weights, where)

    def reply(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=replies, flush=True)

    reply({"dtype": contender.dtype, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        reply(_answer(contender, json.loads(line), where))


def _answer(contender: Any, asked: dict[str, Any], device: torch.device) -> dict[str, Any]:
    op, count = asked["op"], asked.get("count", 0)
    try:
        if op == "start":
            _forget_peak(device)
            contender.start(asked["tokens"], asked["new"])
            return {}
        if op == "read":
            return {"seconds": _timed(lambda: contender.read(count), device)}
        if op == "parts":
            return {"parts": contender.parts(lambda: contender.read(count))}
        if op == "decode":
            return {"seconds": [_timed(contender.decode, device) for _ in range(count)]}
        return {"cache": contender.cache_bytes(asked["tokens"]), "peak": peak_bytes(device)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"oom": str(error).splitlines()[0] if str(error) else "out of memory"}
    except RuntimeError as error:  # how torch's allocator on a CPU says it
        if "can't allocate memory" not in str(error):
            raise
        return {"oom": str(error).splitlines()[0]}


def _timed(work: Any, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _forget_peak(device: torch.device) -> None:
    """So that the peak of a run is not that of one before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
