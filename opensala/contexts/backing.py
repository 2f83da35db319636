"""Pages of the engine's pool whose keys and values lie in segments on disk.

They come when they are wanted: compressed keys are read when a context is opened, blocks are chosen by them,
and the keys and values of the chosen blocks are read, checked and put into the pool just before a layer
attends to them. What was read stays, up to a budget; then the least recently used pages give their memory
back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..engine import Engine
from ..model.storage import CacheStorage
from ..ops import PageTable
from .advice import give_back, in_small_pieces
from .segment import Counter, SegmentFile, as_bytes


@dataclass
class Traffic:
    """How often a layer's page was wanted and at hand, wanted and read, and given back for another one."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float | None:
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else None


class DiskBacking:
    """See the module; one for each engine, made by `DiskBacking.of`.

    Attributes:
        budget: bytes of keys and values from disk that may be in memory; None for no bound. What one layer
            attends to at a time is in memory whatever the budget.
    """

    def __init__(self, storage: CacheStorage) -> None:
        self.storage, self.counter, self.traffic = storage, Counter(), Traffic()
        self.budget: int | None = None
        self._layers = {layer: n for n, layer in enumerate(storage.kv)}
        shape = (len(self._layers), storage.num_pages)
        self._absent, self._used = np.zeros(shape, bool), np.zeros(shape, np.int64)
        self._backed = np.zeros(storage.num_pages, bool)
        self._kept = np.zeros(storage.num_pages, bool)  # during this step
        self._sources: dict[int, tuple[SegmentFile, int]] = {}  # by page of the pool
        self._clock = 0
        self._bytes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for layer, pool in storage.kv.items():
            if pool.keys.device.type == "cpu":
                in_small_pieces(pool.keys)
                in_small_pieces(pool.values)
                self._bytes[layer] = as_bytes(pool.keys), as_bytes(pool.values)

    @classmethod
    def of(cls, engine: Engine) -> "DiskBacking":
        """The backing of an engine's storage, made at the first call."""
        storage = engine.storage
        if not isinstance(storage.backing, cls):
            storage.backing = backing = cls(storage)
            engine.scheduler.pages.freed = backing.forget
        assert isinstance(storage.backing, cls)
        return storage.backing

    @property
    def page_bytes(self) -> int:
        """Keys and values of a page in one layer."""
        pool = next(iter(self.storage.kv.values()))
        return sum(x[0].numel() * x.element_size() for x in (pool.keys, pool.values))

    @property
    def num_absent(self) -> int:
        """Pages of the pool that lack something."""
        return int(self._absent.any(0).sum())

    @property
    def resident_bytes(self) -> int:
        """Keys and values that came from disk and are in memory."""
        return int((self._backed & ~self._absent).sum()) * self.page_bytes

    def expect(self, pages: Sequence[int], sources: Sequence[tuple[SegmentFile, int]]) -> None:
        """Note that these pages' keys and values lie in segments, in all layers."""
        self._absent[:, list(pages)] = True
        self._backed[list(pages)] = True
        self._sources.update(zip(pages, sources, strict=True))

    def forget(self, page: int) -> None:
        """Nobody holds this page any longer."""
        if self._sources.pop(page, None) is not None:
            self._absent[:, page] = False
            self._backed[page] = False

    def is_needed(self, pages: Sequence[int] | np.ndarray) -> bool:
        """Whether any of these pages lacks something, or may lose it."""
        if not self._sources:
            return False
        some = np.asarray(pages, np.int64)
        lacking = self._backed[some] if self.budget is not None else self._absent[:, some]
        return bool(lacking.any())

    def begin(self, pages: Sequence[int] | np.ndarray) -> None:
        """A step begins, in which every layer may read these pages at any time: fill them, and keep them
        until the next step.

        Raises:
            DamagedContext: see `bring`.
        """
        self._kept[:] = False
        self._kept[np.asarray(pages, np.int64)] = True
        self.bring(pages)

    def bring(self, pages: Sequence[int] | np.ndarray, layer: int | None = None) -> None:
        """Fill these pages, of one layer or of all.

        Raises:
            DamagedContext: what lies on disk is not what was written.
        """
        if not self._sources:
            return
        self._clock += 1
        for one in self._layers if layer is None else (layer,):
            wanted = np.unique(np.asarray(pages, np.int64))
            wanted = wanted[self._backed[wanted]]
            row = self._layers[one]
            self._used[row, wanted] = self._clock
            missing = wanted[self._absent[row, wanted]].tolist()
            self.traffic.hits += len(wanted) - len(missing)
            self.traffic.misses += len(missing)
            if missing:
                self._make_room(len(missing))
                self._ask_for(one, missing)
            for page in missing:
                self._fill(one, page)

    def bring_selected(self, layer: int, table: PageTable, blocks: Tensor | None) -> None:
        """Fill what a layer is about to attend to: the blocks `[T, Hkv, K]` chosen, or all of a dense
        sequence."""
        if not self._sources or (self.budget is None and not self._absent[self._layers[layer]].any()):
            return
        bounds, lengths, sparse = (x.tolist() for x in (table.cu_seqlens, table.lengths, table.sparse))
        wanted = []
        for n, (begin, end, length) in enumerate(zip(bounds, bounds[1:], lengths, strict=False)):
            pages = table.pages[n].cpu().numpy()
            if sparse[n] and blocks is not None:
                chosen = np.unique(blocks[begin:end].cpu().numpy())
                wanted.append(pages[chosen[chosen >= 0]])
            else:
                wanted.append(pages[: -(-length // self.storage.config.block_spec.block_size)])
        self.bring(np.concatenate(wanted), layer)  # at once: none of them makes room for another

    def hint(self, pages: Sequence[int]) -> None:
        """Let the disk begin with what is sure to be wanted."""
        for layer, row in self._layers.items():
            self._ask_for(layer, [page for page in pages if self._absent[row, page]])

    def _ask_for(self, layer: int, pages: list[int]) -> None:
        for page in pages:
            file, index = self._sources[page]
            file.hint(layer, index)

    def _make_room(self, pages: int) -> None:
        """Give back the least recently used pages until so many fit into the budget, as far as possible: not
        what the layer at hand has just asked for."""
        if self.budget is None:
            return
        there = self._backed & ~self._absent
        surplus = int(there.sum()) + pages - self.budget // self.page_bytes
        if surplus <= 0:
            return
        rows, places = (there & ~self._kept & (self._used < self._clock)).nonzero()
        oldest = np.argsort(self._used[rows, places], kind="stable")[:surplus]
        for row, page in zip(rows[oldest].tolist(), places[oldest].tolist(), strict=True):
            self._absent[row, page] = True
        layers = list(self._layers)
        for row, page in zip(rows[oldest].tolist(), places[oldest].tolist(), strict=True):
            pool = self.storage.kv[layers[row]]
            give_back(pool.keys[page])
            give_back(pool.values[page])
        self.traffic.evictions += len(oldest)

    def _fill(self, layer: int, page: int) -> None:
        file, index = self._sources[page]
        if layer in self._bytes:
            keys, values = self._bytes[layer]
            file.read_page(layer, index, keys[page].data, values[page].data)
        else:
            pool = self.storage.kv[layer]
            here = [x[page].cpu() for x in (pool.keys, pool.values)]
            file.read_page(layer, index, *(as_bytes(x[None])[0].data for x in here))
            pool.keys[page].copy_(here[0])
            pool.values[page].copy_(here[1])
        self._absent[self._layers[layer], page] = False
