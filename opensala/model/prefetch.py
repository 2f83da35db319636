"""Pages that are read from disk ahead of their use, by a thread beside the one that computes.

What is read waits here until it is wanted; a page that is wanted while it is being read is waited for. A read
that fails is forgotten: whoever wants the page reads it again and sees what is wrong.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np


class Source(Protocol):
    """A file in which pages of keys and values lie."""

    def hint(self, layer: int, index: int, count: int = 1) -> None:
        """Say that `count` pages from `index` on will be read soon."""

    def read_page(self, layer: int, index: int, keys: memoryview, values: memoryview) -> None:
        """Keys and values of page `index`, checked, into memory of their size; ValueError if damaged."""


class Prefetcher:
    """Reads ahead.

    Args:
        page_bytes: of the keys, and as many of the values, of a page in one layer.
        room: pages that may wait at a time.

    Attributes:
        read, used: pages that were asked for ahead of their use, and of them those that were then wanted.
    """

    def __init__(self, page_bytes: int, room: int) -> None:
        self.page_bytes, self.room = page_bytes, room
        self.read = self.used = 0
        self._waiting: dict[tuple[int, int], Future[np.ndarray]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def ask(self, layer: int, pages: list[tuple[int, Source, int]]) -> None:
        """Begin to read pages of a layer (page of the pool, file, page in the file), as far as there is
        room; what waits longest without being wanted makes room."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "prefetch")
        for page, source, index in pages[: self.room]:
            key = layer, page
            if key in self._waiting:
                self._waiting[key] = self._waiting.pop(key)  # the last to make room
                continue
            while len(self._waiting) >= self.room:
                self._waiting.pop(next(iter(self._waiting))).cancel()
            self._waiting[key] = self._thread.submit(self._read, layer, source, index)
            self.read += 1

    def _read(self, layer: int, source: Source, index: int) -> np.ndarray:
        data = np.empty((2, self.page_bytes), np.uint8)
        source.read_page(layer, index, data[0].data, data[1].data)
        return data

    def take(self, layer: int, page: int) -> np.ndarray | None:
        """Keys and values `[2, bytes]` of a page that was asked for; None if it was not, or not begun."""
        future = self._waiting.pop((layer, page), None)
        if future is None or future.cancel():
            return None
        try:
            data = future.result()
        except (OSError, ValueError):  # it is read again by who wants it, who says what is wrong
            return None
        self.used += 1
        return data

    def forget(self, page: int, layers: list[int]) -> None:
        """The page will hold something else."""
        for layer in layers:
            future = self._waiting.pop((layer, page), None)
            if future is not None:
                future.cancel()
