"""In which precision products are computed, and how that is chosen.

Weights and optimizer states are float32 whatever is chosen here. `auto` is bfloat16 on a GPU; on a CPU both
are timed on products of the model's own sizes, for which is faster differs by a factor of two either way.
"""

import contextlib
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

COMPUTE = ("auto", "float32", "bfloat16")
_TOKENS = 512  # of the products that are timed


def choose_compute(name: str, device: torch.device, hidden: int, inner: int) -> str:
    """`float32` or `bfloat16` for a choice of `COMPUTE`; hidden, inner: the widths of a feed-forward."""
    if name != "auto":
        return name
    if device.type != "cpu":
        return "bfloat16"
    return min(("float32", "bfloat16"), key=lambda kind: _seconds(kind, hidden, inner))


def _seconds(kind: str, hidden: int, inner: int) -> float:
    """Seconds of the products of a feed-forward with float32 weights, both ways; the best of three."""
    x, w = torch.randn(_TOKENS, hidden), torch.randn(inner, hidden, requires_grad=True)
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        with autocast(kind, torch.device("cpu")):
            torch.nn.functional.linear(x, w).sum().backward()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def autocast(compute: str, device: torch.device) -> AbstractContextManager[Any]:
    """Products inside the block in bfloat16, or as they come.

    Over several processes the weights come gathered in bfloat16; without them, nothing is kept of a cast:
    its memory would be that of a whole model.
    """
    if compute == "bfloat16":
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=alone)
    return contextlib.nullcontext()
