"""Bounds of an engine, and how its memory is divided by them."""

from dataclasses import dataclass

import torch

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.storage import CacheSizes, cache_sizes, compressed_bytes
from ..model.tiers import Allocate
from .memory import cache_budget

KV_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "int8": torch.int8}
_ANSWER_PAGES = 16  # pages for the answer to the longest prompt


@dataclass(frozen=True)
class EngineOptions:
    """Bounds of an engine, fixed when it is made.

    Attributes:
        max_batch_tokens: tokens computed in one step; a longer prompt is read in chunks.
        max_running: sequences that hold memory at a time; more wait.
        memory_bytes: for keys, values and states; None for most of what is free on the device.
        max_cached_tokens: for keys and values, instead of a share of `memory_bytes`.
        max_snapshots: states kept beside the running ones; None for a tenth of the memory.
        snapshot_interval: tokens of a prompt between states that are kept for later; None lets the memory
            decide, 0 keeps those at the ends of documents and turns and where texts part only.
        min_shared: prompts that begin with so many equal tokens share the reading of them.
        speculate: tokens to draft at most by prompt lookup, for requests that do not say.
        kv_dtype: `auto` keeps keys and values in the model's dtype, `int8` in eight bits (on a CPU).
        host_memory: bytes of keys and values in main memory, of those that also lie on disk.
        device_memory: bytes of keys and values on the GPU; the others lie in main memory and are copied up
            when blocks of them are chosen. None for all on the GPU.
    """

    max_batch_tokens: int = 4096
    max_running: int = 16
    memory_bytes: int | None = None
    max_cached_tokens: int | None = None
    max_snapshots: int | None = None
    snapshot_interval: int | None = None
    min_shared: int = 64
    speculate: int = 0
    kv_dtype: str = "auto"
    host_memory: int | None = None
    device_memory: int | None = None

    def __post_init__(self) -> None:
        least = {"max_batch_tokens": 1, "max_running": 1, "min_shared": 1, "speculate": 0}
        least |= {"memory_bytes": 1, "max_cached_tokens": 1, "max_snapshots": 0, "snapshot_interval": 0}
        least |= {"host_memory": 1, "device_memory": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and EngineOptions.__dataclass_fields__[name].default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be {' or '.join(KV_DTYPES)}, got {self.kv_dtype!r}")


def pool_sizes(
    options: EngineOptions, config: MiniCPMSALAConfig, device: torch.device, dtype: torch.dtype
) -> tuple[int, int]:
    """Pages of keys and values, and slots of states, that an engine's memory is divided into.

    Raises:
        ValueError: there is not even memory for one page and the states of the running sequences.
    """
    (page, slot), host = cache_sizes(config, dtype, KV_DTYPES[options.kv_dtype]), 0
    compressed = compressed_bytes(config, dtype)
    size = config.block_spec.block_size
    budget = options.memory_bytes or cache_budget(device, config, dtype, options.max_batch_tokens)
    if options.device_memory is not None:  # pages are on the device with their compressed keys only
        budget -= options.device_memory
        above = torch.device("cpu")
        host = cache_budget(above, config, dtype, 0) // (page - compressed)
        page = compressed
    running = 2 * options.max_running + 2
    kept = options.max_snapshots
    if kept is None:
        kept = min(1024, max(16, budget // 10 // max(1, slot)))
        if device.type == "cuda":  # taken at once there: one long text comes before many snapshots
            longest = -(-max(1 << 20, config.max_position_embeddings) // size) + _ANSWER_PAGES
            spare = (budget - running * slot - longest * page) // max(1, slot)
            kept = max(4, min(kept, spare))
    pages = (budget - (running + kept) * slot) // max(1, page)
    if options.max_cached_tokens is not None:
        pages = -(-options.max_cached_tokens // size) + 1
    if options.device_memory is not None:
        pages = min(pages, host)
    most = 16 * max(1 << 20, config.max_position_embeddings) // size
    if pages < 2:
        raise ValueError(
            f"{budget:,} bytes are available for texts on {device.type}, which hold none: a page "
            f"takes {page:,} bytes and the states of "
            f"{options.max_running} "
            f"sequences {running * slot:,}; allow more memory or fewer sequences at a time"
        )
    return min(pages, most), running + kept


def snapshot_interval(config: MiniCPMSALAConfig, sizes: CacheSizes) -> int:
    """Tokens of a prompt between states that are kept for later, where the options leave it open."""
    page, slot = sizes
    as_many = config.block_spec.block_size * slot // max(1, page)  # tokens whose pages weigh as much
    return max(8192, 4 * as_many)


def frames_on_gpu(model: MiniCPMSALAForCausalLM) -> Allocate:
    """What makes the frames of the device tier on the model's GPU."""
    devices = {model.device, *model.model.layer_devices()}
    if len(devices) > 1 or model.device.type == "cpu":
        raise ValueError(
            f"device_memory bounds what lies on one GPU, and this model is on "
            f"{', '.join(sorted(map(str, devices)))}: leave it out, or use host_memory"
        )
    return lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=model.device)
