"""Which pages of which layers are at hand in a tier of memory, and which of them give way: integers only.

A tier holds a bounded number of *frames*, each with one page of one layer. Pages that are wanted get frames;
when none is free, the least recently wanted pages give theirs up, never one of those wanted now.
"""

import numpy as np


class Frames:
    """The frames of one tier.

    Args:
        layers, pages: of the pool whose pages may lie here.
        limit: how many frames there are; None for no bound.
        numbered: frames are places of their own, numbered from 0; otherwise a page that is here lies in its
            own place, and its frame is its number.
    """

    def __init__(self, layers: int, pages: int, limit: int | None, *, numbered: bool = False) -> None:
        assert not numbered or limit is not None, "places of their own are counted"
        self.limit, self.numbered = limit, numbered
        self.of = np.full((layers, pages), -1, np.int32)  # frame of each page in each layer; -1: not here
        self.bound = np.full(pages, numbered)  # pages that count and may give way
        self._used = np.zeros((layers, pages), np.int64)
        self._clock = 0
        self._free = list(range((limit or 0) - 1, -1, -1)) if numbered else []

    @property
    def count(self) -> int:
        """Frames in use by pages that count."""
        return int(((self.of >= 0) & self.bound).sum())

    def want(self, layer: int, pages: np.ndarray) -> np.ndarray:
        """Note that these pages (each once) of a layer are wanted now; returns those that are not here."""
        self._clock += 1
        self._used[layer, pages] = self._clock
        return pages[self.of[layer, pages] < 0]

    def make_room(self, count: int) -> list[tuple[int, int]]:
        """Let the least recently wanted pages go until `count` more fit; returns (layer, page) of each.

        Those of the last `want` stay: `count` and they must fit together.
        """
        if self.limit is None or not count:
            return []
        return self._evict(count)

    def shrink(self) -> list[tuple[int, int]]:
        """Let pages go until no more than the limit are here; between two steps."""
        self._clock += 1
        return [] if self.limit is None else self._evict(0)

    def _evict(self, count: int) -> list[tuple[int, int]]:
        assert self.limit is not None, "there is a bound"
        here = (self.of >= 0) & self.bound
        surplus = int(here.sum()) + count - self.limit
        if surplus <= 0:
            return []
        rows, places = (here & (self._used < self._clock)).nonzero()
        assert len(rows) >= surplus, "what is wanted at a time fits: see `Tiers.check`"
        oldest = np.argpartition(self._used[rows, places], surplus - 1)[:surplus]
        gone = list(zip(rows[oldest].tolist(), places[oldest].tolist(), strict=True))
        for layer, page in gone:
            self._take_back(layer, page)
        return gone

    def put(self, layer: int, pages: np.ndarray) -> np.ndarray:
        """Give frames to pages of a layer that have none, for which there is room; returns the frames."""
        if not self.numbered:
            self.of[layer, pages] = pages
        else:
            self.of[layer, pages] = [self._free.pop() for _ in range(len(pages))]
        return self.of[layer, pages]

    def drop(self, page: int) -> None:
        """Forget a page in all layers."""
        for layer in (self.of[:, page] >= 0).nonzero()[0].tolist():
            self._take_back(layer, page)
        self.bound[page] = self.numbered

    def _take_back(self, layer: int, page: int) -> None:
        if self.numbered:
            self._free.append(int(self.of[layer, page]))
        self.of[layer, page] = -1

    def check_integrity(self) -> None:
        """Assert that every frame is free or belongs to one page of one layer, and that none is too many."""
        taken = self.of[self.of >= 0].tolist()
        if self.numbered:
            assert sorted(taken + self._free) == list(range(self.limit or 0)), "frames are lost or shared"
        else:
            assert all((row[row >= 0] == (row >= 0).nonzero()[0]).all() for row in self.of), "a page moved"
        assert self.limit is None or self.count <= self.limit, f"{self.count} frames, {self.limit} allowed"
