"""Pages of the engine's pool whose keys and values still lie in segments on disk.

They come when they are wanted: compressed keys are read when a context is opened, blocks are chosen by them,
and the keys and values of the chosen blocks are read, checked and put into the pool just before a layer
attends to them. What was read stays until the pool's page is given to another text.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..engine import Engine
from ..model.storage import CacheStorage
from ..ops import PageTable
from .segment import Counter, SegmentFile, as_bytes


class DiskBacking:
    """See the module; one for each engine, made by `DiskBacking.of`."""

    def __init__(self, storage: CacheStorage) -> None:
        self.storage, self.counter = storage, Counter()
        self._layers = {layer: n for n, layer in enumerate(storage.kv)}
        self._absent = np.zeros((len(self._layers), storage.num_pages), bool)
        self._sources: dict[int, tuple[SegmentFile, int]] = {}  # by page of the pool, while a layer lacks it

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
    def num_absent(self) -> int:
        """Pages of the pool that lack something."""
        return len(self._sources)

    def expect(self, pages: Sequence[int], sources: Sequence[tuple[SegmentFile, int]]) -> None:
        """Note that these pages' keys and values lie in segments, in all layers."""
        self._absent[:, list(pages)] = True
        self._sources.update(zip(pages, sources, strict=True))

    def forget(self, page: int) -> None:
        """Nobody holds this page any longer."""
        if self._sources.pop(page, None) is not None:
            self._absent[:, page] = False

    def is_needed(self, pages: Sequence[int] | np.ndarray) -> bool:
        """Whether any of these pages lacks something."""
        return bool(self._sources) and bool(self._absent[:, np.asarray(pages, np.int64)].any())

    def bring(self, pages: Sequence[int] | np.ndarray, layer: int | None = None) -> None:
        """Fill these pages, of one layer or of all.

        Raises:
            DamagedContext: what lies on disk is not what was written.
        """
        if not self._sources:
            return
        for one in self._layers if layer is None else (layer,):
            wanted = self._missing(one, pages)
            for page in wanted:
                file, index = self._sources[page]
                file.hint(one, index)
            for page in wanted:
                self._fill(one, page)

    def hint(self, pages: Sequence[int]) -> None:
        """Let the disk begin with what is sure to be wanted."""
        for layer in self._layers:
            for page in self._missing(layer, pages):
                file, index = self._sources[page]
                file.hint(layer, index)

    def _missing(self, layer: int, pages: Sequence[int] | np.ndarray) -> list[int]:
        wanted = np.unique(np.asarray(pages, np.int64))
        return wanted[self._absent[self._layers[layer], wanted]].tolist()

    def bring_selected(self, layer: int, table: PageTable, blocks: Tensor | None) -> None:
        """Fill what a layer is about to attend to: the blocks `[T, Hkv, K]` chosen, or all of a dense
        sequence."""
        if not self._sources or not self._absent[self._layers[layer]].any():
            return
        bounds, lengths, sparse = (x.tolist() for x in (table.cu_seqlens, table.lengths, table.sparse))
        for n, (begin, end, length) in enumerate(zip(bounds, bounds[1:], lengths, strict=False)):
            pages = table.pages[n].cpu().numpy()
            if sparse[n] and blocks is not None:
                chosen = np.unique(blocks[begin:end].cpu().numpy())
                self.bring(pages[chosen[chosen >= 0]], layer)
            else:
                self.bring(pages[: -(-length // self.storage.config.block_spec.block_size)], layer)

    def _fill(self, layer: int, page: int) -> None:
        file, index = self._sources[page]
        pool = self.storage.kv[layer]
        targets = [pool.keys[page], pool.values[page]]
        here = [x if x.device.type == "cpu" and x.is_contiguous() else x.cpu().contiguous() for x in targets]
        file.read_page(layer, index, *(as_bytes(x[None]).data.cast("B") for x in here))
        for target, read in zip(targets, here, strict=True):
            if target.data_ptr() != read.data_ptr():
                target.copy_(read)
        self._absent[self._layers[layer], page] = False
        if not self._absent[:, page].any():
            del self._sources[page]
