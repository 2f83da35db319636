"""Whose turn it is: a queue in which owners take turns, however much each of them has sent."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Things wait in the order in which their owner sent them; owners are served in turn."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()  # the owner whose turn it is comes first

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def push(self, owner: str, thing: T) -> None:
        self._lines.setdefault(owner, deque()).append(thing)

    def pop(self) -> T:
        """The next thing; its owner's turn comes again after all others'.

        Raises:
            IndexError: nothing waits.
        """
        if not self._lines:
            raise IndexError("nothing waits")
        owner, line = next(iter(self._lines.items()))
        thing = line.popleft()
        self._lines.move_to_end(owner)
        if not line:
            del self._lines[owner]
        return thing

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out what is not wanted any more; returns it."""
        gone: list[T] = []
        for owner, line in list(self._lines.items()):
            gone += [thing for thing in line if unwanted(thing)]
            self._lines[owner] = deque(thing for thing in line if not unwanted(thing))
            if not self._lines[owner]:
                del self._lines[owner]
        return gone
