"""Bounds of an engine, and how its memory is divided by them."""

from dataclasses import dataclass

import torch

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.storage import CacheSizes, cache_sizes, compressed_bytes
from ..model.tiers import Allocate
from .memory import cache_budget

KV_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
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
        kv_dtype: `auto` keeps keys and values in the dtype that the model computes in, unless `load_engine`
            says otherwise; on a CPU `bfloat16` keeps them in 16 bits and `int8` in eight, with compressed
            keys in 16; `float32` is for a model that computes in it.
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
        kv_dtype_of(self.kv_dtype)


def kv_dtype_of(name: str, field: str = "kv_dtype") -> torch.dtype | None:
    """The dtype of keys and values that a name stands for; None: as the model computes.

    Raises:
        ValueError: an unknown name; `field` is where it came from.
    """
    if name not in KV_DTYPES:
        *others, last = KV_DTYPES
        raise ValueError(f"{field} must be {', '.join(others)} or {last}, got {name!r}")
    return KV_DTYPES[name]


def kept_dtype(name: str, computed: torch.dtype, field: str = "kv_dtype") -> torch.dtype | None:
    """The dtype of keys and values that a name stands for beside a model that computes in `computed`; None:
    that one.

    Raises:
        ValueError: an unknown name, or more bits than the model computes in.
    """
    kept = kv_dtype_of(name, field)
    if kept == computed:
        return None
    if kept is not None and kept.itemsize > computed.itemsize:
        bits = str(computed).removeprefix("torch.")
        raise ValueError(f"{field} {name} has more bits than {bits}, which the model computes in: use auto")
    return kept


def pool_sizes(
    options: EngineOptions, config: MiniCPMSALAConfig, device: torch.device, dtype: torch.dtype
) -> tuple[int, int]:
    """Pages of keys and values, and slots of states, that an engine's memory is divided into.

    Raises:
        ValueError: there is not even memory for one page and the states of the running sequences.
    """
    kept = kv_dtype_of(options.kv_dtype)
    (page, slot), host = cache_sizes(config, dtype, kept), 0
    compressed = compressed_bytes(config, dtype, kept)
    size = config.block_spec.block_size
    budget = options.memory_bytes or cache_budget(device, config, dtype, options.max_batch_tokens)
    if options.device_memory is not None:  # pages are on the device with their compressed keys only
        budget -= options.device_memory
        above = torch.device("cpu")
        host = cache_budget(above, config, dtype, 0) // (page - compressed)
        page = compressed
    running = 2 * options.max_running + 2
    snapshots = options.max_snapshots
    if snapshots is None:
        snapshots = min(1024, max(16, budget // 10 // max(1, slot)))
        if device.type == "cuda":  # taken at once there: one long text comes before many snapshots
            longest = -(-max(1 << 20, config.max_position_embeddings) // size) + _ANSWER_PAGES
            spare = (budget - running * slot - longest * page) // max(1, slot)
            snapshots = max(4, min(snapshots, spare))
    pages = (budget - (running + snapshots) * slot) // max(1, page)
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
    return min(pages, most), running + snapshots


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
