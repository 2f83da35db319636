"""How much memory a prompt will need and how much there is: asked before any work is done."""

import resource
import sys
from pathlib import Path

import psutil
import torch

from ..model import MiniCPMSALAConfig
from ..ops.sparse import num_windows

_RESERVE = 200 << 20  # bytes left alone: allocator slack, the operating system


def cache_bytes(config: MiniCPMSALAConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes the cache of one sequence of `tokens` tokens takes: K, V, two levels of compressed keys,
    states."""
    assert (
        config.num_key_value_heads and config.head_dim and config.lightning_nh and config.lightning_head_dim
    )
    spec, layers = config.block_spec, config.num_hidden_layers
    sparse = sum(config.is_sparse(i) for i in range(layers))
    rows = 2 * tokens + num_windows(tokens, spec.kernel_size, spec.kernel_stride)
    rows += num_windows(tokens, spec.coarse_size, spec.coarse_stride)
    per_row = config.num_key_value_heads * config.head_dim * dtype.itemsize
    state = 4 * config.lightning_nh * config.lightning_head_dim**2
    return sparse * rows * per_row + (layers - sparse) * state


def activation_bytes(config: MiniCPMSALAConfig, chunk: int, tokens: int, dtype: torch.dtype) -> int:
    """A rough upper bound of what one forward call on `chunk` tokens needs beside weights and cache."""
    width = max(config.hidden_size * 12, 3 * config.intermediate_size + 3 * config.hidden_size)
    assert config.head_dim
    attention = 96 * config.num_attention_heads * config.head_dim + 24 * config.block_spec.num_blocks
    keys = tokens * config.head_dim * 8  # one layer's keys and compressed keys in float32
    return chunk * 4 * (width + attention) + keys + (256 << 20)


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


def check_prompt_fits(
    config: MiniCPMSALAConfig, tokens: int, chunk: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError with needed and available bytes if a prompt of `tokens` tokens cannot fit."""
    needed = cache_bytes(config, tokens, dtype) + activation_bytes(config, min(chunk, tokens), tokens, dtype)
    free = available_bytes(device) - _RESERVE
    if needed > free:
        raise ValueError(
            f"a prompt of {tokens:,} tokens needs {needed:,} bytes on {device.type}, {max(free, 0):,} are "
            "available: "
            "shorten the document, free memory, or use a smaller --dtype"
        )


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
