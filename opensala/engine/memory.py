"""How much memory there is for texts: asked before any work is done."""

import ctypes
import resource
import sys
from pathlib import Path

import psutil
import torch

from ..model import MiniCPMSALAConfig

_RESERVE = 200 << 20  # bytes left alone: allocator slack, the operating system
_CPU_SHARE = 0.6  # of the rest
_GPU_RESERVE = 0.02  # of a GPU's memory: fragments, captured steps, logits
# What the sparse kernels hold beside activations: partial results, scores, the index of pairs. Held against
# what they allocate by tests/engine/test_launches.py.
_SPARSE_SCRATCH = 1230 << 20


def available_bytes(device: torch.device) -> int:
    """Free bytes on the device: GPU memory, or main memory within the limits of this control group."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator holds for nobody is free
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such limit here ("max" is not a number)
            continue
    return free


def activation_bytes(config: MiniCPMSALAConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that a step of `tokens` tokens takes on a GPU beside weights and cache, at its peak.

    The residual stream and its norm, and the larger of the two things that are made from it: gate, up and
    their product, or the projections of a mixer, once as one product and once as heads, with what attends to
    them.
    """
    assert config.num_key_value_heads and config.head_dim, "filled by the configuration"
    assert config.lightning_nh and config.lightning_nkv and config.lightning_head_dim, "likewise"
    sparse = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    lightning = (2 * config.lightning_nh + 2 * config.lightning_nkv) * config.lightning_head_dim
    states = 4 * config.lightning_nh * config.lightning_head_dim**2 * max(16, -(-tokens // 512))
    one = tokens * dtype.itemsize
    return 2 * one * config.hidden_size + max(
        3 * one * config.intermediate_size,
        2 * one * lightning + states,
        2 * one * sparse + _SPARSE_SCRATCH,
    )


def cache_budget(
    device: torch.device, config: MiniCPMSALAConfig, dtype: torch.dtype, step_tokens: int
) -> int:
    """Bytes for keys, values and states: what is free, less what a step of `step_tokens` tokens takes.

    On a CPU it is a bound, not an allocation: memory is taken as texts fill it, and others want some.
    """
    free = available_bytes(device)
    if device.type != "cuda":
        return max(0, int(_CPU_SHARE * (free - _RESERVE)))
    total = torch.cuda.mem_get_info(device)[1]
    return max(0, int(free - activation_bytes(config, dtype, step_tokens) - _GPU_RESERVE * total))


def resident_bytes(device: torch.device) -> int:
    """Memory of this process now: resident bytes on a CPU, allocated bytes on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """Highest memory use of this process so far: resident bytes on a CPU, allocated bytes on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # of this program only; getrusage also counts the process that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> bool:
    """Give main memory that was freed in this process back to the system; False where that cannot be asked.

    glibc keeps it, in a heap for every few threads, for what they may want next. It takes milliseconds, and
    the next thing to be read as long again: for a process that has nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return False
    trim(0)
    return True
