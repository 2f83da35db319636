"""Context parallelism: every row split over the cp ranks, and how the layers of the model come to know of
it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model import MiniCPMSALAModel
from ..model.layout import SequenceLayout
from .exchange import gather_tokens, state_before
from .mesh import ParallelMesh


class SplitRows:
    """`opensala.model.layout.SequenceParallel` by collectives over a group of ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def ranks(self) -> int:
        return self._ranks

    def gather(self, x: Tensor) -> Tensor:
        return gather_tokens(x, self.group)

    def state_before(
        self, k: Tensor, v: Tensor, slopes: list[float], layout: SequenceLayout
    ) -> Tensor | None:
        if not any(layout.reach):
            return None
        state = state_before(k, v, slopes, layout.lengths[-1], layout.reach, k.shape[1], self.group)
        fresh = len(layout.lengths) - len(state)  # documents that begin here
        return torch.cat([state, state.new_zeros(fresh, *state.shape[1:])]) if fresh else state


def context_parallel(model: nn.Module, mesh: ParallelMesh) -> nn.Module:
    """Make the model expect this rank's stretch of each row; returns the model.

    Without cp ranks (cp = 1) it expects whole rows again. Inputs come from `shard_sequence`; pass
    `use_cache=False`.

    Raises:
        ValueError: not a MiniCPM-SALA model.
    """
    decoders = [m for m in model.modules() if isinstance(m, MiniCPMSALAModel)]
    if len(decoders) != 1:
        raise ValueError(
            f"context_parallel takes a MiniCPM-SALA model, got {type(model).__name__} with "
            f"{len(decoders)} such decoders"
        )
    decoders[0].parallel = SplitRows(mesh.cp_group) if mesh.cp > 1 else None
    return model
