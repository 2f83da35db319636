"""llama.cpp as a contender, in the environment that `opensala bench llama-cpp` makes; see `worker.py`.

python llama_worker.py FILE.gguf THREADS

It imports nothing of opensala, which that environment has not.
"""

import contextlib
import ctypes
import json
import os
import random
import sys
import time
from typing import Any

import llama_cpp


class Llama:
    """A model file, read through llama.cpp's own functions with flash attention and a cache in float16."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.threads, self.context = threads, None
        callback = llama_cpp.llama_log_callback(lambda *_: None)
        self.silence = callback  # must live as long as the library calls it
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def start(self, tokens: int, new: int) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = (tokens + new + 511) // 256 * 256
        params.n_batch, params.n_ubatch = 4096, 512
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = 1
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise MemoryError(f"llama.cpp has no memory for {tokens} tokens")

    def read(self, count: int) -> float:
        ids = [random.randrange(3, self.vocabulary) for _ in range(count)]
        held = (ctypes.c_int32 * count)(*ids)  # the batch has its address only
        batch = llama_cpp.llama_batch_get_one(held, count)
        start = time.perf_counter()
        if llama_cpp.llama_decode(self.context, batch):
            raise MemoryError("llama.cpp refused a batch")
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start


def peak() -> int:
    with open("/proc/self/status") as status:
        lines = [line for line in status if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def answer(llama: Llama, asked: dict[str, Any]) -> dict[str, Any]:
    op, count = asked["op"], asked.get("count", 0)
    try:
        if op == "start":
            forget_peak()
            llama.start(asked["tokens"], asked["new"])
            return {}
        if op == "read":
            return {"seconds": llama.read(count)}
        if op == "decode":
            return {"seconds": [llama.read(1) for _ in range(count)]}
        return {"cache": llama_cpp.llama_state_get_size(llama.context), "peak": peak()}
    except MemoryError as error:
        return {"oom": str(error)}


def main(path: str, threads: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llama = Llama(path, int(threads))
    print(json.dumps({"dtype": llama_cpp.__version__, "threads": int(threads)}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llama, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
