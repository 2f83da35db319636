"""A million tokens through each op and through the shipped model, each in a process of its own so that its
peak memory shows.

python -m opensala.bench.million OP TOKENS     prints seconds and peak bytes as JSON; run by `opensala bench
ops --million`
"""

import json
import subprocess
import sys
import time

import torch

from ..engine import EngineOptions, SamplingParams, load_engine
from ..engine.memory import peak_bytes
from ..engine.progress import token_progress
from ..ops import BlockSpec, alibi_slopes, lightning_attention, select_blocks, sparse_attention
from .record import Report
from .timing import Timing

TOKENS = 1 << 20
HEADS, DIM = 2, 64  # query heads of the shipped model's sparse layers; one kv head
SPEC = BlockSpec(window_size=512, topk=16)
OPS = (
    "lightning_attention",
    "select_blocks",
    "select_blocks, hierarchical",
    "sparse_attention",
    "shipped model",
    "shipped model, bfloat16",  # its keys and values in 16 bits
    "shipped model, int8",
)


def measure(op: str, tokens: int) -> dict[str, float]:
    """Seconds of one forward call, and the most memory this process ever held."""
    if op.startswith("shipped model"):
        return _model(tokens, op.partition(", ")[2] or "auto")
    q = torch.randn(1, tokens, HEADS, DIM)
    k, v = (torch.randn(1, tokens, HEADS if op == "lightning_attention" else 1, DIM) for _ in range(2))
    blocks = None
    if op == "sparse_attention":  # lists of the right shape: a window and random blocks before it
        blocks = random_lists(tokens)
    start = time.perf_counter()
    with torch.no_grad():
        if op == "lightning_attention":
            lightning_attention(q, k, v, torch.tensor(alibi_slopes(HEADS)))
        elif blocks is not None:
            sparse_attention(q, k, v, blocks, SPEC.block_size)
        else:
            select_blocks(q, k, SPEC, search="hierarchical" if "hierarchical" in op else "exact")
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes(torch.device("cpu"))}


def random_lists(tokens: int) -> torch.Tensor:
    """Block lists `[1, T, 1, K]` as selection makes them: first block, window, random ones between;
    ascending, -1 behind."""
    window, chosen = SPEC.window_blocks + 1, SPEC.num_blocks
    own = torch.arange(tokens) // SPEC.block_size
    lists = torch.full((tokens, chosen), -1, dtype=torch.int32)
    for first in range(0, tokens, 1 << 16):
        last = min(tokens, first + (1 << 16))
        mine = own[first:last, None]
        near = mine - torch.arange(window)
        between = (mine - window).clamp(min=1)
        gaps = torch.rand(last - first, chosen - window).cumsum(1)
        far = (gaps / gaps[:, -1:] * between).long() * (mine > 2 * chosen)
        both = torch.cat((near, far), 1).clamp(min=-1).sort(1, descending=True).values
        both[:, 1:][both[:, 1:] == both[:, :-1]] = -1
        both = both.sort(1, descending=True).values
        lists[first:last] = (
            torch.where(both < 0, 1 << 30, both)
            .sort(1)
            .values.int()
            .masked_fill_((both < 0).sort(1).values, -1)
        )
    return lists[None, :, None]


def _model(tokens: int, kv_dtype: str) -> dict[str, float]:
    room = EngineOptions(kv_dtype=kv_dtype, max_cached_tokens=tokens + 1024, max_running=1)
    engine = load_engine(options=room)
    ids = torch.randint(3, engine.config.vocab_size, (tokens,)).tolist()
    start = time.perf_counter()
    with token_progress("reading", tokens) as advance:
        engine.generate([ids], SamplingParams(max_tokens=1), on_read=advance)
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes(torch.device("cpu"))}


def time_million(report: Report, tokens: int = TOKENS) -> dict[str, dict[str, float]]:
    """Rows for every op at a million tokens, two query heads of 64 and one kv head, 24 blocks; and for the
    shipped model."""
    report.say(f"{tokens:,} tokens, each in a process of its own")
    results = {}
    for op in OPS:
        command = [sys.executable, "-m", "opensala.bench.million", op, str(tokens)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = results[op] = json.loads(found.stdout)
        seconds = result["seconds"]
        report.add(
            op,
            "" if op.startswith("shipped model") else "cpp",
            Timing(seconds, seconds, seconds, 1),
            peak=result["peak"],
            shape=f"T={tokens}" if op.startswith("shipped model") else f"T={tokens} Hq={HEADS} D={DIM}",
        )
    return results


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
