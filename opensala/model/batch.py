"""One step of the model over several sequences at once: what the layers need to know, made once, used by all.

The tokens of the step lie in one row, sequence behind sequence. Lengths, page tables and slots are tensors on
the device, so that no layer waits for it or builds anything from Python lists. They travel there together, in
one copy, and are views of one tensor afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..ops import PageTable
from .config import MiniCPMSALAConfig
from .layers import rotary_angles
from .storage import CacheStorage


@dataclass(slots=True)
class BatchRow:
    """The part of a step that belongs to one sequence.

    Attributes:
        pages: its pages, in order, as int32: at least as many as `start + count` tokens fill.
        start: tokens it has in the cache.
        count: tokens of this step, the next ones.
        sparse: whether they attend to selected blocks or to everything.
        read, write: the slots of the states before and behind them; -1 for none yet, or not to be kept.
    """

    pages: np.ndarray
    start: int
    count: int
    sparse: bool
    read: int
    write: int


@dataclass(frozen=True)
class BatchNumbers:
    """A step in numbers, on the host: the tensors of a `ForwardBatch` before they are tensors."""

    positions: np.ndarray
    bounds: np.ndarray
    lengths: np.ndarray
    pages: np.ndarray
    sparse: np.ndarray
    read: np.ndarray
    write: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[BatchRow], page_size: int) -> "BatchNumbers":
        # Numbers of Python: numpy takes longer for so few.
        ends = [row.start + row.count for row in rows]
        used = [-(-end // page_size) for end in ends]
        pages = np.full((len(rows), max(used)), -1, np.int32)
        for row, many, to in zip(rows, used, pages, strict=True):
            to[:many] = row.pages[:many]
        bounds = np.array([0, *accumulate(row.count for row in rows)], np.int32)
        if bounds[-1] == len(rows):
            positions = np.array([row.start for row in rows], np.int64)
        else:
            positions = np.concatenate([np.arange(row.start, row.start + row.count) for row in rows])
        flags = np.array([[row.sparse, row.read, row.write] for row in rows], np.int32).T.copy()
        return cls(positions, bounds, np.array(ends, np.int32), pages, *flags)


_ALIGNED = (
    4  # integers: fields begin at multiples of 16 bytes, as kernels take the beginnings of tensors to do
)


@dataclass(frozen=True)
class NumbersLayout:
    """Where the numbers of a step lie in one row of int32: `tokens` tokens of `sequences` sequences, with
    room for `width` pages each."""

    tokens: int
    sequences: int
    width: int

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """First place and size of each field."""
        n = self.sequences
        sizes = {"ids": self.tokens, "positions": self.tokens, "bounds": n + 1, "lengths": n, "sparse": n}
        sizes |= {"read": n, "write": n, "pages": n * self.width}
        places, first = {}, 0
        for name, size in sizes.items():
            places[name] = first, size
            first += -(-size // _ALIGNED) * _ALIGNED
        return places

    @property
    def size(self) -> int:
        first, size = self.places["pages"]
        return first + -(-size // _ALIGNED) * _ALIGNED

    def write(self, target: np.ndarray, numbers: BatchNumbers, ids: np.ndarray | None) -> None:
        """Put a step's numbers into `target` `[size]`; pages that no sequence has are -1."""
        for name, (first, size) in self.places.items():
            if name == "pages":
                table = target[first : first + size].reshape(self.sequences, self.width)
                table[:, : numbers.pages.shape[1]] = numbers.pages
                table[:, numbers.pages.shape[1] :] = -1
            elif name != "ids":
                target[first : first + size] = getattr(numbers, name)
            elif ids is not None:
                target[first : first + size] = ids

    def fields(self, packed: Tensor) -> dict[str, Tensor]:
        """The fields of a packed tensor `[size]`, as views of it."""
        found = {name: packed.narrow(0, *place) for name, place in self.places.items()}
        found["pages"] = found["pages"].view(self.sequences, self.width)
        return found


def host_numbers(size: int, device: torch.device) -> Tensor:
    """int32 `[size]` in main memory, from where it can be copied to the device without waiting for it.

    Each step gets memory of its own: the allocator gives it to another one only when the copy is done.
    """
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")


def send(host: Tensor, device: torch.device, into: Tensor | None = None) -> Tensor:
    """What `host_numbers` made, on the device: in new memory (on a CPU the same), or copied to `into`."""
    if into is not None:
        return into.copy_(host, non_blocking=True)
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Integers `[N]` as an int32 tensor on the device, without waiting for it."""
    host = host_numbers(len(values), device)
    host.numpy()[:] = values
    return send(host, device)


@dataclass
class ForwardBatch:
    """See the module; made by `ForwardBatch.of`.

    Attributes:
        positions: `[T]` of each token in its sequence.
        table: page tables, lengths and modes.
        read, write: `[N]` slots.
        any_sparse: whether any sequence selects blocks (known without asking the device).
        ids: `[T]` the tokens themselves, where the caller sent them along.
        recorded: keys and values `[T, H, D]` of each Lightning layer, if they are to be kept for a rollback.
        chosen: blocks `[T, Hkv, K]` of each sparse layer (see `select_blocks_paged`), if somebody wants to
            know them; empty if all sequences attend densely. A replayed step writes to the same tensors each
            time.
    """

    storage: CacheStorage
    positions: Tensor
    table: PageTable
    read: Tensor
    write: Tensor
    any_sparse: bool
    recorded: dict[int, tuple[Tensor, Tensor]] | None = None
    ids: Tensor | None = None
    chosen: dict[int, Tensor] | None = None
    _angles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _moved: dict[torch.device, "ForwardBatch"] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        storage: CacheStorage,
        rows: Sequence[BatchRow],
        device: torch.device,
        *,
        ids: np.ndarray | None = None,
        positions: Tensor | None = None,
        record: bool = False,
    ) -> "ForwardBatch":
        """The step of these rows; `positions` `[T]` instead of each token's place in its sequence."""
        numbers = BatchNumbers.of(rows, storage.config.block_spec.block_size)
        layout = NumbersLayout(len(numbers.positions), len(rows), numbers.pages.shape[1])
        host = host_numbers(layout.size, device)
        layout.write(host.numpy(), numbers, ids)
        packed = send(host, device)
        any_sparse = any(row.sparse for row in rows)
        batch = cls.over(storage, layout, packed, any_sparse, record=record)
        batch.positions = batch.positions if positions is None else positions
        batch.ids = batch.ids if ids is not None else None
        return batch

    @classmethod
    def over(
        cls,
        storage: CacheStorage,
        layout: NumbersLayout,
        packed: Tensor,
        any_sparse: bool,
        *,
        record: bool = False,
    ) -> "ForwardBatch":
        """The step whose numbers lie in `packed` `[layout.size]`, int32 on the device, now and later."""
        n = layout.fields(packed)
        table = PageTable(n["bounds"], n["lengths"], n["pages"], n["sparse"])
        kept: dict[int, tuple[Tensor, Tensor]] | None = {} if record else None
        return cls(storage, n["positions"], table, n["read"], n["write"], any_sparse, kept, n["ids"])

    def on(self, device: torch.device) -> "ForwardBatch":
        """The same step for a layer that lies on another device."""
        if device == self.positions.device:
            return self
        if device not in self._moved:
            self._moved[device] = ForwardBatch(
                self.storage,
                self.positions.to(device),
                PageTable(*(x.to(device) for x in self.table)),
                self.read.to(device),
                self.write.to(device),
                self.any_sparse,
                self.recorded,
                chosen=self.chosen,
            )
        return self._moved[device]

    def angles(self, dim: int, config: MiniCPMSALAConfig) -> tuple[Tensor, Tensor]:
        """cos and sin `[1, T, dim / 2]` of the rotary angles, computed once for all layers of the step."""
        if dim not in self._angles:
            self._angles[dim] = rotary_angles(
                self.positions[None], dim, config.rope_theta, config.rope_scaling
            )
        return self._angles[dim]
