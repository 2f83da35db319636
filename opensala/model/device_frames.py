"""The device tier: some pages of keys and values where the model runs, over a pool of all in main memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..cache.frames import Frames
from ..ops import KVPages, PageTable
from .batch import BatchNumbers, BatchRow, on_device

if TYPE_CHECKING:
    from .tiers import Tiers

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
# Given some of a step's tokens, and the pool and table to put them into.
Write = Callable[[slice, KVPages, PageTable], None]


def page_table(rows: list[BatchRow], pages: list[np.ndarray], size: int, device: torch.device) -> PageTable:
    """The page table of rows whose pages lie in these places."""
    n = BatchNumbers.of([replace(r, pages=p) for r, p in zip(rows, pages, strict=True)], size)
    table = [on_device(x, device) for x in (n.bounds, n.lengths, n.pages.ravel(), n.sparse)]
    table[2] = table[2].view(n.pages.shape)
    return PageTable(*table)


class DeviceFrames:
    """The device tier: frames that all sparse layers share, over a pool in main memory.

    Attributes:
        pool: the frames, as pages of a layer; compressed keys in them are those of the pages being written.
    """

    def __init__(self, tiers: "Tiers", memory: int, allocate: Allocate) -> None:
        self.tiers, storage = tiers, tiers.storage
        like = storage.kv[tiers.layers[0]]
        frame = sum(x[0].numel() * x.element_size() for x in like)
        count = memory // frame
        tiers.check("device memory", count, frame)
        self.pool = KVPages(*(allocate((count, *x.shape[1:]), x.dtype) for x in like))
        self.frames = Frames(len(tiers.layers), storage.num_pages, count, numbered=True)

    def bring(self, layer: int, pages: np.ndarray) -> None:
        """Copy pages (each once) of a layer up that are not here; together they must fit.

        Raises:
            DamagedContext: see `Tiers.bring`.
        """
        tiers, row = self.tiers, self.tiers._row[layer]
        missing = self.frames.want(row, pages)
        traffic = tiers.device_traffic
        traffic.hits += len(pages) - len(missing)
        traffic.misses += len(missing)
        traffic.evictions += len(self.frames.make_room(len(missing)))
        step = tiers.host.limit or max(1, len(missing))
        for first in range(0, len(missing), step):
            some = missing[first : first + step]
            found = tiers.read(layer, some.tolist())
            where = torch.from_numpy(self.frames.put(row, some).astype(np.int64)).to(self.pool.keys.device)
            for target, data in zip(self.pool[:2], found, strict=True):
                target[where] = data.to(target.device)
            tiers.copied += len(some) * tiers.page_bytes

    def store(self, layer: int, write: Write) -> None:
        """`Tiers.store` by way of the frames, written through to the pool."""
        tiers, limit = self.tiers, self.frames.limit
        spans = [(0, sum(row.count for row in tiers._rows))]
        while spans:
            first, end = spans.pop()
            read, written = tiers.touched(first, end)
            if len(read) > (limit or 0) and end - first > 1:
                middle = (first + end) // 2
                spans += [(middle, end), (first, middle)]
                continue
            self.bring(layer, read)
            self._store(layer, (first, end), written, write)

    def _store(self, layer: int, span: tuple[int, int], written: np.ndarray, write: Write) -> None:
        tiers, pool = self.tiers, self.tiers.storage.kv[layer]
        of, device = self.frames.of[tiers._row[layer]], self.pool.keys.device
        pages, frames = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (written, of[written]))
        for kept, here in zip(pool[2:], self.pool[2:], strict=True):
            here[frames] = kept[pages]
        rows = tiers.cut(*span)
        table = page_table(rows, [of[row.pages] for row in rows], tiers.page_size, device)
        write(slice(*span), self.pool, table)
        for kept, here in zip(pool[2:], self.pool[2:], strict=True):
            kept[pages] = here[frames]
        for kept, here in zip(pool[:2], self.pool[:2], strict=True):
            kept[torch.from_numpy(written)] = here[frames].to(kept.device)
