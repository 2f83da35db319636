"""One optimizer step: sequences drawn, packed into passes, and the gradient of their mean loss.

Every rank draws all sequences of a step and takes its own, so the data does not depend on the number of
ranks, and the number of targets, which the sum of losses is divided by, is known without asking.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.flops import training_flops
from ..parallel import ParallelMesh, on_whole_weights, shard_sequence, share_of_loss, total_over_ranks
from .data import PackedSequence, StageData
from .loss import IGNORED, chunked_cross_entropy
from .recipe import Stage

LossOfRow = Callable[..., Tensor]


@dataclass(frozen=True)
class StepBatch:
    """The sequences of a step, and the data's position behind them."""

    sequences: list[PackedSequence]
    position: dict[str, Any]
    skipped: int

    @property
    def targets(self) -> int:
        return sum(int((s.labels != IGNORED).sum()) for s in self.sequences)


class Prefetcher:
    """Draws the batch of the next step while the current one is computed."""

    def __init__(self, data: StageData, count: int) -> None:
        self.data, self.count = data, count
        self._pool = ThreadPoolExecutor(1)
        self._next: Future[StepBatch] = self._pool.submit(self._draw)

    def _draw(self) -> StepBatch:
        sequences = [self.data.next() for _ in range(self.count)]
        return StepBatch(sequences, self.data.state_dict(), self.data.skipped)

    def next(self, more: bool) -> StepBatch:
        """The next batch; `more` says whether another one will be asked for."""
        batch = self._next.result()
        if more:
            self._next = self._pool.submit(self._draw)
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def recompute_layers(model: MiniCPMSALAForCausalLM) -> None:
    """Keep the inputs of layers only and run them again in the backward pass, with the blocks the first run
    selected."""
    for layer in model.model.layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]  # an attribute of the layer


def row_loss(model: MiniCPMSALAForCausalLM) -> LossOfRow:
    """A function of `input_ids`, `targets`, `position_ids` and `cu_seqlens` of a packed row to its sum of
    losses."""
    return on_whole_weights(model, _row_loss, "loss_of_row")


def _row_loss(model: MiniCPMSALAForCausalLM, targets: Tensor, **row: Tensor) -> Tensor:
    hidden = model.model(**row, use_cache=False).last_hidden_state / model.config.logit_divisor
    return chunked_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())


def packed_row(sequences: list[PackedSequence], learn: bool = True) -> dict[str, Tensor]:
    """Sequences one after the other as a row `[1, n * length]` whose documents do not see each other."""
    bounds, length = [0], len(sequences[0].ids)
    for n, sequence in enumerate(sequences):
        bounds += [n * length + b for b in sequence.bounds[1:]]
    labels = torch.cat([s.labels for s in sequences])[None]
    return {
        "input_ids": torch.cat([s.ids for s in sequences])[None],
        "targets": labels if learn else torch.full_like(labels, IGNORED),
        "cu_seqlens": torch.tensor(bounds),
    }


def passes(sequences: list[PackedSequence], together: int, mesh: ParallelMesh) -> list[dict[str, Tensor]]:
    """This rank's rows; as many on every rank. Ranks that have none left get one without targets, for the
    others wait."""
    most = -(-len(sequences) // mesh.dp)
    mine = sequences[mesh.dp_rank :: mesh.dp]
    rows = []
    for a in range(0, most, together):
        part = mine[a : a + together]
        rows.append(packed_row(part) if part else packed_row(sequences[:1], learn=False))
    return rows


def accumulate(loss_of_row: LossOfRow, batch: StepBatch, together: int, mesh: ParallelMesh) -> float:
    """Add the gradient of the step's mean loss to the parameters; returns that mean over the targets of all
    ranks."""
    targets, total = batch.targets, torch.zeros((), dtype=torch.float64)
    for whole in passes(batch.sequences, together, mesh):
        row = shard_sequence(whole, mesh)
        row.pop("weights")
        loss = loss_of_row(**row)
        share_of_loss(loss, targets, mesh).backward()
        total += loss.detach().double().cpu()
    return total_over_ranks(total, mesh) / targets


@torch.no_grad()
def mean_loss(loss_of_row: LossOfRow, batch: StepBatch, together: int, mesh: ParallelMesh) -> float:
    """The mean loss over the batch's targets, without gradients."""
    total = torch.zeros((), dtype=torch.float64)
    for whole in passes(batch.sequences, together, mesh):
        row = shard_sequence(whole, mesh)
        row.pop("weights")
        total += loss_of_row(**row).double().cpu()
    return total_over_ranks(total, mesh) / max(1, batch.targets)


class FlopCounter:
    """FLOPs of a step from the lengths of its documents."""

    def __init__(self, config: MiniCPMSALAConfig, stage: Stage) -> None:
        self._config, self._stage = config, stage
        self._known: dict[int, float] = {}

    def _document(self, length: int) -> float:
        if length not in self._known:
            self._known[length] = length * training_flops(self._config, length, self._stage.sparse)
        return self._known[length]

    def of(self, batch: StepBatch) -> float:
        return sum(
            self._document(b - a)
            for s in batch.sequences
            for a, b in zip(s.bounds, s.bounds[1:], strict=False)
        )
