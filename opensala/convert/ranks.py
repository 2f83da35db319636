"""How the processes of a conversion share its work: sequences of a step, probes, what one decides for all.

Every rank draws the whole batch and works on its own part, so the data does not depend on how many there are.
Where a batch does not divide, a rank runs a sequence that counts nothing: the others wait for its part of the
weights.

Shapes: R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..parallel import ParallelMesh, all_gather, from_first, shard_each, shard_model

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a conversion, seen from one of them; without a mesh it is the only one."""

    mesh: ParallelMesh | None = None

    @property
    def rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.rank

    @property
    def world(self) -> int:
        return 1 if self.mesh is None else self.mesh.world

    def passes(self, count: int, rows: int) -> list[slice | None]:
        """This rank's of `count` sequences, `rows` at a time. As many on every rank: None stands for a pass
        that counts nothing."""
        per = -(-count // self.world)
        start = min(self.rank * per, count)
        stop = min(start + per, count)
        found: list[slice | None] = []
        for a in range(start, start + per, rows):
            found.append(slice(a, min(a + rows, stop)) if a < stop else None)
        return found

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of x `[N, ...]`, as many on every rank; the last one stands in where rows end."""
        per = -(-len(x) // self.world)
        index = torch.arange(self.rank * per, (self.rank + 1) * per).clamp(max=len(x) - 1)
        return x if self.world == 1 else x[index.to(x.device)]

    def gather(self, x: Tensor, count: int) -> Tensor:
        """What the ranks made of their `own` rows, `[n, ...]` each: all `count` of them, in order."""
        if self.mesh is None or self.world == 1:
            return x
        there = x.contiguous().to(self.mesh.device)
        out = there.new_empty(self.world * x.shape[0], *x.shape[1:])
        all_gather(out, there, group=self.mesh.shard.get_group())
        return out[:count].to(x.device)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks; nothing waits for a GPU."""
        if self.mesh is not None and self.world > 1:
            dist.all_reduce(x, group=self.mesh.shard.get_group())
        return x

    def total_at(self, owner: int, x: Tensor) -> Tensor:
        """The sum of x over all ranks on rank `owner`; on the others x is not defined afterwards."""
        if self.mesh is not None and self.world > 1:
            dist.reduce(x, owner, group=self.mesh.shard.get_group())
        return x

    def from_owner(self, owner: int, x: Tensor) -> Tensor:
        """x of rank `owner`, on every rank."""
        if self.mesh is not None and self.world > 1:
            dist.broadcast(x, owner, group=self.mesh.shard.get_group())
        return x

    def first(self, work: Callable[[], T]) -> T:
        """What `work()` gives on the first rank, on every one; so is the ValueError or OSError it raises."""
        return work() if self.mesh is None else from_first(self.mesh, work)

    def wait(self) -> None:
        """For all ranks to come here."""
        if self.world > 1:
            dist.barrier()

    def shard(self, model: Any, compute: str) -> Any:
        """Split a model's weights over the ranks, in place, if there is more than one."""
        if self.mesh is None or self.world == 1:
            return model
        return shard_model(model, self.mesh, compute_dtype=_dtype(compute))

    def shard_mixers(self, mixers: nn.ModuleList, compute: str) -> nn.ModuleList:
        """The same for mixers, each a unit of its own."""
        if self.mesh is not None and self.world > 1:
            shard_each(mixers, self.mesh, compute_dtype=_dtype(compute))
        return mixers


def _dtype(compute: str) -> torch.dtype | None:
    return None if compute == "float32" else getattr(torch, compute)
