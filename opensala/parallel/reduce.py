"""One loss for all ranks: the sum over their tokens, divided by the number of tokens of all of them.

FSDP averages gradients over ranks, so each rank's sum is divided by the tokens of all ranks and multiplied by
their number.
Dividing by a rank's own tokens would weigh the answers of a rank that has few of them more.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import ParallelMesh

T = TypeVar("T")


def total_over_ranks(value: Tensor | float, mesh: ParallelMesh) -> float:
    """Sum of a number over all ranks, in float64. All ranks must call it."""
    total = torch.as_tensor(value, dtype=torch.float64).detach().clone().to(mesh.device)
    dist.all_reduce(total, group=mesh.shard.get_group())
    return float(total)


def share_of_loss(loss_sum: Tensor, tokens: float, mesh: ParallelMesh) -> Tensor:
    """What a rank calls `backward` on: its sum of losses as a share of the mean over all ranks' tokens.

    Args:
        loss_sum: sum of weight * loss over this rank's tokens, of one micro-batch. A rank without any target
            must go through the model all the same: the others wait for it.
        tokens: sum of the weights over all ranks and all micro-batches of the step (`total_over_ranks`).

    Raises:
        ValueError: no token with a target on any rank.
    """
    if not tokens > 0:
        raise ValueError(f"a step needs at least one token with a target, got a total weight of {tokens}")
    return loss_sum * (mesh.world / tokens)


def agree(mesh: ParallelMesh, error: Exception | None) -> None:
    """Raise on every rank what rank 0 found, if anything; every rank waits for it."""
    found = [error]
    if mesh.world > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise found[0]


def from_first(mesh: ParallelMesh, work: Callable[[], T]) -> T:
    """What `work()` gives on rank 0, on every rank; it is not called on the others. An OSError or ValueError
    it raises is raised on every rank."""
    found: list[Any] = [None, None]
    if mesh.rank == 0:
        try:
            found[0] = work()
        except (OSError, ValueError) as error:
            found[1] = error
    if mesh.world > 1:
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]
