"""A fixed number of equal places (pages of keys and values, or slots of states), each free or held by
someone.

A place is held by reference: sequences, snapshots and nodes of the prefix tree each count once. It knows
nothing of what lies in a place.
"""

from collections import Counter
from collections.abc import Callable, Iterable


class PoolExhausted(RuntimeError):
    """There are fewer free places than were asked for; nothing was taken."""


class Pool:
    """`size` places, numbered from 0.

    Args:
        size: how many places there are.
        what: what a place is, for messages.
    """

    def __init__(self, size: int, what: str) -> None:
        self.what = what
        self.freed: Callable[[int], None] | None = None  # told of each place that nobody holds any longer
        self._references = [0] * size
        # In order: the last one given back is the next one taken.
        self._free = dict.fromkeys(range(size - 1, -1, -1))

    @property
    def size(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free(self) -> list[int]:
        """The places that nobody holds."""
        return list(self._free)

    def references(self, place: int) -> int:
        """How many hold the place."""
        return self._references[place]

    def take(self, count: int = 1) -> list[int]:
        """`count` free places, each held once from now on.

        Raises:
            PoolExhausted: fewer are free.
        """
        if count > len(self._free):
            raise PoolExhausted(f"{count} {self.what} are needed, {len(self._free)} of {self.size} are free")
        taken = [self._free.popitem()[0] for _ in range(count)]
        for place in taken:
            self._references[place] = 1
        return taken

    def take_again(self, place: int) -> int:
        """`place` if it is free, else another free one, held once from now on: what was there not long ago
        may still lie in a near cache.

        Raises:
            PoolExhausted: none is free.
        """
        if place not in self._free:
            return self.take()[0]
        del self._free[place]
        self._references[place] = 1
        return place

    def share(self, places: Iterable[int]) -> None:
        """Hold places once more that someone holds already."""
        for place in places:
            assert self._references[place] > 0, f"{self.what} {place} is free: it cannot be shared"
            self._references[place] += 1

    def release(self, places: Iterable[int]) -> None:
        """Hold places once less; those that nobody holds any longer are free."""
        for place in places:
            assert self._references[place] > 0, f"{self.what} {place} is free already"
            self._references[place] -= 1
            if not self._references[place]:
                self._free[place] = None
                if self.freed is not None:
                    self.freed(place)

    def grow(self, size: int) -> None:
        """Add free places until there are `size`."""
        self._free = dict.fromkeys(range(size - 1, self.size - 1, -1)) | self._free
        self._references += [0] * (size - self.size)

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Assert that exactly these holders hold what the pool says is held, and that all the rest is
        free."""
        held = Counter(place for places in holders for place in places)
        for place, count in enumerate(self._references):
            assert count == held[place], f"{self.what} {place}: {count} references, {held[place]} holders"
        free = {place for place, count in enumerate(self._references) if not count}
        assert set(self._free) == free, f"the free list of {self.what} is wrong"
