"""Values that a recomputed forward pass must take from the first one instead of computing them again.

Activation checkpointing runs a layer twice. Which blocks a query attends to is a choice: where scores nearly
tie, the second run may choose otherwise (another kernel order on a GPU is enough), and the backward pass
would then belong to another function than the loss. So the first run's choices are kept and given to the
second.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import Tensor

_tape: ContextVar["_Tape | None"] = ContextVar("opensala_replay", default=None)


class _Tape:
    def __init__(self, values: list[Tensor], playing: bool) -> None:
        self.values, self.playing, self.place = values, playing, 0

    def take(self, compute: Callable[[], Tensor]) -> Tensor:
        if not self.playing:
            self.values.append(compute())
            return self.values[-1]
        assert self.place < len(self.values), "the second run asks for more choices than the first one made"
        self.place += 1
        return self.values[self.place - 1]


def record_or_replay(compute: Callable[[], Tensor]) -> Tensor:
    """The value of `compute()`; in a recomputed pass, the value it had in the first one."""
    tape = _tape.get()
    return compute() if tape is None else tape.take(compute)


@contextmanager
def _with(values: list[Tensor], playing: bool) -> Iterator[None]:
    token = _tape.set(_Tape(values, playing))
    try:
        yield
    finally:
        _tape.reset(token)


def record_and_replay() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts of one checkpointed call, as `torch.utils.checkpoint` takes them from its
    `context_fn`."""
    values: list[Tensor] = []
    return _with(values, False), _with(values, True)
