"""Texts of a cache over pages and slots; holders are counted, so that rows, forks and snapshots can share."""

from array import array
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache import Pool
from .config import MiniCPMSALAConfig
from .storage import CacheStorage

_GROWTH = 2  # of a small cache whose prompt was not announced
_STEP = 1024  # pages that such a cache grows by at most: memory for twice a long text is not to be had


@dataclass
class Row:
    """One text of a cache: its tokens' pages, how many tokens, and the slot of the states behind them (-1:
    none)."""

    pages: array = field(default_factory=lambda: array("i"))
    length: int = 0
    slot: int = -1
    ids: array | None = field(default_factory=lambda: array("i"))  # None once embeddings came without ids


@dataclass
class Piece:
    """Some of a call's tokens of one row that are computed in one mode: `count` of them from place `offset`
    on."""

    row: int
    offset: int
    count: int
    sparse: bool


class Rows:
    """Rows that hold their pages and slots in the pools, until `close` or the end of their life."""

    def __init__(self, store: "RowStore", rows: list[Row]) -> None:
        self.store, self.rows = store, rows
        for row in rows:
            store.pages.share(row.pages)
            store.slots.share([row.slot] if row.slot >= 0 else [])

    def close(self) -> None:
        for row in self.rows:
            self.store.pages.release(row.pages)
            self.store.slots.release([row.slot] if row.slot >= 0 else [])
        self.rows = []

    def __del__(self) -> None:
        self.close()


class RowStore:
    """Storage and the pools that count who holds what of it; shared by a cache, its forks and its
    snapshots."""

    def __init__(self, config: MiniCPMSALAConfig) -> None:
        self.config = config
        self.pages, self.slots = Pool(0, "pages"), Pool(0, "state slots")
        self.storage: CacheStorage | None = None

    def reserve(self, pages: int, slots: int, exact: bool, dtype: torch.dtype, devices: Any) -> CacheStorage:
        """See that so many pages and slots are free."""
        if self.storage is None:
            self.storage = CacheStorage(self.config, 0, 0, dtype, devices)
        num_pages = self.pages.size + max(0, pages - self.pages.num_free)
        if num_pages > self.pages.size and not exact:
            num_pages = max(num_pages, min(_GROWTH * self.pages.size, self.pages.size + _STEP))
        num_slots = self.slots.size
        if slots > self.slots.num_free:
            num_slots = max(num_slots + slots - self.slots.num_free, _GROWTH * num_slots)
        self.storage.grow(num_pages, num_slots)
        self.pages.grow(num_pages)
        self.slots.grow(num_slots)
        return self.storage


def copy_row(row: Row) -> Row:
    """The same text; it holds nothing by itself."""
    return Row(array("i", row.pages), row.length, row.slot, None if row.ids is None else array("i", row.ids))
