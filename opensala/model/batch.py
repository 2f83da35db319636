"""One step of the model over several sequences at once: what the layers need to know, made once, used by all.

The tokens of the step lie in one row, sequence behind sequence. Lengths, page tables and slots are tensors on
the device, so that no layer waits for it or builds anything from Python lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..ops import PageTable
from .config import MiniCPMSALAConfig
from .layers import rotary_angles
from .storage import CacheStorage


@dataclass(frozen=True)
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
        starts = np.array([row.start for row in rows], np.int64)
        counts = np.array([row.count for row in rows], np.int64)
        ends = starts + counts
        used = -(-ends // page_size)
        pages = np.full((len(rows), int(used.max())), -1, np.int32)
        for i, row in enumerate(rows):
            pages[i, : used[i]] = row.pages[: used[i]]
        bounds = np.zeros(len(rows) + 1, np.int32)
        counts.cumsum(out=bounds[1:])
        positions = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], counts)
        flags = np.array([[row.sparse, row.read, row.write] for row in rows], np.int32).T.copy()
        return cls(positions, bounds, ends.astype(np.int32), pages, *flags)


@dataclass
class ForwardBatch:
    """See the module; made by `ForwardBatch.of`.

    Attributes:
        positions: `[T]` of each token in its sequence.
        table: page tables, lengths and modes.
        read, write: `[N]` slots.
        any_sparse: whether any sequence selects blocks (known without asking the device).
        recorded: keys and values `[T, H, D]` of each Lightning layer, if they are to be kept for a rollback.
    """

    storage: CacheStorage
    positions: Tensor
    table: PageTable
    read: Tensor
    write: Tensor
    any_sparse: bool
    recorded: dict[int, tuple[Tensor, Tensor]] | None = None
    _angles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _moved: dict[torch.device, "ForwardBatch"] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        storage: CacheStorage,
        rows: Sequence[BatchRow],
        device: torch.device,
        *,
        positions: Tensor | None = None,
        record: bool = False,
    ) -> "ForwardBatch":
        """The step of these rows; `positions` `[T]` instead of each token's place in its sequence."""
        numbers = BatchNumbers.of(rows, storage.config.block_spec.block_size)
        if positions is None:
            positions = _to(numbers.positions, device)
        table = PageTable(
            *(_to(x, device) for x in (numbers.bounds, numbers.lengths, numbers.pages, numbers.sparse))
        )
        read, write = _to(numbers.read, device), _to(numbers.write, device)
        any_sparse = any(row.sparse for row in rows)
        return cls(storage, positions, table, read, write, any_sparse, {} if record else None)

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
            )
        return self._moved[device]

    def angles(self, dim: int, config: MiniCPMSALAConfig) -> tuple[Tensor, Tensor]:
        """cos and sin `[1, T, dim / 2]` of the rotary angles, computed once for all layers of the step."""
        if dim not in self._angles:
            self._angles[dim] = rotary_angles(
                self.positions[None], dim, config.rope_theta, config.rope_scaling
            )
        return self._angles[dim]


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
