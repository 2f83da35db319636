"""The memory that sequences share: pages of keys and values, slots of recurrent states.

A page is one selection block of one sequence: K, V and the compressed keys whose windows end in it, for every
sparse layer. A slot is the float32 states of all Lightning layers at one position. Which page or slot belongs
to whom is the business of `opensala.cache`; what is written into them that of the ops.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..ops import KVPages, PageTable
from ..ops.sparse import num_windows
from ..ops.sparse.int8 import SCALE_BYTES
from .advice import give_back
from .config import MiniCPMSALAConfig

if TYPE_CHECKING:
    from .batch import BatchRow


class CacheSizes(NamedTuple):
    """Bytes of one page and of one slot."""

    page: int
    slot: int


def cache_sizes(
    config: MiniCPMSALAConfig, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> CacheSizes:
    """What a page and a slot of a model take, over all its layers; `kv_dtype` as in `CacheStorage`."""
    assert (
        config.num_key_value_heads and config.head_dim and config.lightning_nh and config.lightning_head_dim
    )
    spec, layers = config.block_spec, config.num_hidden_layers
    sparse = sum(config.is_sparse(i) for i in range(layers))
    rows = 2 * spec.block_size * row_bytes(config.head_dim, kv_dtype or dtype)
    page = sparse * rows * config.num_key_value_heads + compressed_bytes(config, dtype, kv_dtype)
    return CacheSizes(page, (layers - sparse) * 4 * config.lightning_nh * config.lightning_head_dim**2)


def compressed_dtype(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> torch.dtype:
    """In which dtype compressed keys are kept beside keys and values of `kv_dtype`, as in `CacheStorage`.

    Every step reads all of them. Rounding changes each number by a 512th of it at most.
    """
    if kv_dtype == torch.int8:
        return torch.bfloat16 if dtype == torch.float32 else dtype
    return kv_dtype or dtype


def compressed_bytes(
    config: MiniCPMSALAConfig, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> int:
    """What a page's compressed keys take, over all layers."""
    assert config.num_key_value_heads and config.head_dim, "filled by the configuration"
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    rows = sparse * sum(_compressed_per_page(config))
    width = config.head_dim * compressed_dtype(dtype, kv_dtype).itemsize
    return rows * config.num_key_value_heads * width


def row_bytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes of a key or value of one token and head: of int8 with its scale."""
    return dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)


def _compressed_per_page(config: MiniCPMSALAConfig) -> tuple[int, int]:
    spec = config.block_spec
    return -(-spec.block_size // spec.kernel_stride), -(-spec.block_size // spec.coarse_stride)


class Backing(Protocol):
    """Pages of the pool whose keys and values still lie elsewhere; their compressed keys are always here."""

    def bring(self, pages: Sequence[int] | np.ndarray, layer: int | None = None) -> None:
        """Fill these pages, of one layer or of all."""

    def begin(self, rows: "Sequence[BatchRow]") -> bool:
        """A step begins; whether a layer may want what is not at hand."""

    def store(self, layer: int, table: PageTable, write: Callable[[slice, KVPages, PageTable], None]) -> None:
        """Let `write` put the step's new tokens where they belong."""

    def pieces(
        self, layer: int, table: PageTable, blocks: Tensor | None
    ) -> "Iterator[tuple[slice, KVPages, PageTable]]":
        """The step's tokens, some at a time, with pool and table of what they attend to: the blocks
        `[T, Hkv, K]` chosen, or all of a dense sequence."""

    def check_prompt(self, tokens: int) -> None:
        """Refuse (ValueError) a text of so many tokens that cannot be attended to."""


class CacheStorage:
    """Pages and slots of one model on one device (or, where its layers are spread over several, on those).

    On a CPU the memory is the operating system's zero pages until something is written, so that a large pool
    costs what is used of it.

    Args:
        config: the model's configuration.
        pages, slots: how many there are.
        dtype: of keys and values; states are float32.
        devices: the device of each layer, or one for all.
        kv_dtype: torch.int8 or torch.bfloat16 for keys and values in fewer bits; compressed keys follow
            (`compressed_dtype`).
        kv_device: where keys and values lie, if not where their layers do: under a device tier.
        scratch: one page and one slot more, that belong to nobody and that nobody reads: what the padding of
            a recorded step writes (`self.scratch`, else None).
    """

    def __init__(
        self,
        config: MiniCPMSALAConfig,
        pages: int,
        slots: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device] | torch.device,
        *,
        kv_dtype: torch.dtype | None = None,
        kv_device: torch.device | None = None,
        scratch: bool = False,
    ) -> None:
        self.scratch = (pages, slots) if scratch else None
        pages, slots = pages + scratch, slots + scratch
        self.config, self.dtype, self.kv_dtype = config, dtype, kv_dtype or dtype
        self.compressed_dtype = compressed_dtype(dtype, kv_dtype)
        layers = range(config.num_hidden_layers)
        self.devices = [devices] * len(layers) if isinstance(devices, torch.device) else list(devices)
        self.num_pages, self.num_slots, self.kv_device = pages, slots, kv_device
        self.backing: Backing | None = None
        self.kv = {i: self._new_pages(self.devices[i], pages) for i in layers if config.is_sparse(i)}
        self.states = {i: self._new_slots(self.devices[i], slots) for i in layers if not config.is_sparse(i)}

    def _new_pages(self, device: torch.device, pages: int) -> KVPages:
        config, size = self.config, self.config.block_spec.block_size
        assert config.num_key_value_heads and config.head_dim, "filled by the configuration"
        heads, kv = config.num_key_value_heads, self.kv_dtype
        width = row_bytes(config.head_dim, kv) // kv.itemsize
        tensors = [_zeros((pages, size, heads, width), kv, self.kv_device or device) for _ in range(2)]
        for n in _compressed_per_page(config):
            tensors.append(_zeros((pages, n, heads, config.head_dim), self.compressed_dtype, device))
        return KVPages(*tensors)

    def _new_slots(self, device: torch.device, slots: int) -> Tensor:
        config = self.config
        assert config.lightning_nh and config.lightning_head_dim, "filled by the configuration"
        shape = (slots, config.lightning_nh, config.lightning_head_dim, config.lightning_head_dim)
        return _zeros(shape, torch.float64 if self.dtype == torch.float64 else torch.float32, device)

    @property
    def num_bytes(self) -> int:
        sizes = cache_sizes(self.config, self.dtype, self.kv_dtype)
        return self.num_pages * sizes.page + self.num_slots * sizes.slot

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, (from, to) each, in all layers."""
        for layer, pool in self.kv.items():
            if self.backing is not None and pairs:
                self.backing.bring([source for source, _ in pairs], layer)
            for tensor in pool:
                for source, target in pairs:
                    tensor[target].copy_(tensor[source])

    def give_back(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Let the system have the memory of pages and slots that nobody holds, where it lies in main memory:
        what they held is lost."""
        for pools, places in ((self.kv.values(), pages), ([[s] for s in self.states.values()], slots)):
            free = np.unique(np.array(places, np.int64))
            runs = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1) if len(free) else []
            for tensor in (tensor for pool in pools for tensor in pool):
                for run in runs:
                    give_back(tensor[int(run[0]) : int(run[-1]) + 1])

    def grow(self, pages: int, slots: int) -> None:
        """Make room for more, keeping what there is: a copy of everything, where an engine never does
        that."""
        if pages > self.num_pages:
            for i, old in self.kv.items():
                new = self._new_pages(self.devices[i], pages)
                for target, source in zip(new, old, strict=True):
                    target[: self.num_pages] = source
                self.kv[i] = new
            self.num_pages = pages
        if slots > self.num_slots:
            for i, state in self.states.items():
                larger = self._new_slots(self.devices[i], slots)
                larger[: self.num_slots] = state
                self.states[i] = larger
            self.num_slots = slots


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # usable inside and outside of inference mode, whichever comes first
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # numpy's zeros are the system's, which torch's are not. They begin where the system's own pages do,
        # so that a page of ours shares none of those with its neighbours: it is taken, and given back, whole.
        size = math.prod(shape) * dtype.itemsize
        memory = np.zeros(size + mmap.PAGESIZE, np.uint8)
        begin = -memory.ctypes.data % mmap.PAGESIZE
        return torch.from_numpy(memory[begin : begin + size]).view(dtype).view(shape)


def text_bytes(
    config: MiniCPMSALAConfig, tokens: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> int:
    """Bytes that a text of `tokens` tokens needs: K, V, both levels of compressed keys, states; `kv_dtype` as
    in `CacheStorage`."""
    if not tokens:
        return 0
    assert config.num_key_value_heads and config.head_dim, "filled by the configuration"
    spec, layers = config.block_spec, config.num_hidden_layers
    sparse = sum(config.is_sparse(i) for i in range(layers))
    windows = num_windows(tokens, spec.kernel_size, spec.kernel_stride)
    windows += num_windows(tokens, spec.coarse_size, spec.coarse_stride)
    per_head = 2 * tokens * row_bytes(config.head_dim, kv_dtype or dtype)
    per_head += windows * config.head_dim * compressed_dtype(dtype, kv_dtype).itemsize
    return sparse * config.num_key_value_heads * per_head + cache_sizes(config, dtype).slot
