"""How much memory there is for texts: asked before any work is done."""

import resource
import sys
from pathlib import Path

import psutil
import torch

_RESERVE = 200 << 20  # bytes left alone: allocator slack, the operating system
_SHARES = {"cpu": 0.6, "cuda": 0.8}  # of the rest


def available_bytes(device: torch.device) -> int:
    """Free bytes on the device: GPU memory, or main memory within the limits of this control group."""
    if device.type == "cuda":
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


def cache_budget(device: torch.device) -> int:
    """Bytes for keys, values and states: most of what is free, the rest being left for activations.

    On a CPU it is a bound, not an allocation: memory is taken as texts fill it.
    """
    share = _SHARES.get(device.type, _SHARES["cpu"])
    return max(0, int(share * (available_bytes(device) - _RESERVE)))


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
