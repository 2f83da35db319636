"""One stage of training, from wherever it stands to its end.

A step draws a batch, adds up gradients over passes, clips, is checked, and is applied or skipped. After every
`save_every` steps
the whole state is written: weights, moments, position in the data, the guard's memory. Nothing random happens
outside the data, so a run resumed from a checkpoint repeats on a CPU what it would have done, bit for
bit.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from ..model import MiniCPMSALAForCausalLM
from ..parallel import ParallelMesh, clip_gradients, context_parallel, shard_model, total_over_ranks
from ..runs import RunFolder, progress_bar
from .checkpoints import Checkpoint, Checkpoints
from .data import StageData
from .guard import StepGuard
from .memory import pass_tokens
from .optim import new_adamw, set_rate
from .recipe import Recipe, Stage
from .steps import FlopCounter, Prefetcher, StepBatch, accumulate, mean_loss, recompute_layers, row_loss
from .watch import Board, peak_memory


class Stopped(Exception):
    """A signal asked the run to stop; everything was saved."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


@dataclass
class Signals:
    """Whether SIGTERM or SIGINT came. A second SIGINT stops at once."""

    came: int = 0
    _old: dict[int, Any] = field(default_factory=dict)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.came == signal.SIGINT and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.came = signum

    @contextmanager
    def watched(self) -> Iterator["Signals"]:
        """Catch them while the block runs."""
        self._old = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for signum, old in self._old.items():
                signal.signal(signum, old)


class StageRun:
    """A stage in progress.

    Args:
        recipe, stage, index: what to do, and the stage's place among all.
        model: its weights in float32, those the stage begins with; taken over and changed in place.
        data: the stage's sequences.
        mesh: the ranks; with one rank and float32 nothing is sharded.
        folder: of the run, for metrics, on rank 0; checkpoints: of the run.
        flops_per_second: of matrix products on the device.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        index: int,
        model: MiniCPMSALAForCausalLM,
        data: StageData,
        mesh: ParallelMesh,
        folder: RunFolder | None,
        checkpoints: Checkpoints,
        flops_per_second: float,
        quiet: bool,
    ) -> None:
        self.recipe, self.stage, self.index, self.mesh, self.data = recipe, stage, index, mesh, data
        self.folder, self.checkpoints, self.flops_per_second, self.quiet = (
            folder,
            checkpoints,
            flops_per_second,
            quiet or mesh.rank > 0,
        )
        self.model = prepared(model, recipe, stage, mesh)
        self.optimizer = new_adamw(self.model, model.config, recipe.optimizer)
        self.loss_of_row = row_loss(self.model)
        self.guard = StepGuard(recipe.guard)
        self.flops = FlopCounter(model.config, stage)
        self.together = max(1, pass_tokens(recipe, stage) // stage.sequence)
        self.step, self.tokens = 0, 0
        self.position: dict[str, Any] | None = None

    def probe(self, batch: StepBatch) -> float:
        """Mean loss of the model as it is on a batch that is not trained on."""
        return mean_loss(self.loss_of_row, batch, self.together, self.mesh)

    def begin(self, before: Checkpoint | None) -> None:
        """Stand where the stage's last checkpoint was made, or at its start, with the weights (and moments)
        of `before`."""
        own = self.checkpoints.last(self.stage.name)
        if own is None:
            if before is not None:
                self.checkpoints.load(
                    before, self.model, None if self.stage.fresh_optimizer else self.optimizer
                )
            self._forget(0)
            return
        extra = self.checkpoints.load(own, self.model, self.optimizer)
        self.step, self.tokens = extra["step"], extra["tokens"]
        self.guard.load_state_dict(extra["guard"])
        self.position = extra["data"]
        self.data.load_state_dict(extra["data"])
        self._forget(self.step)

    def _forget(self, step: int) -> None:
        if self.folder is not None:
            self.folder.forget_after(self.stage.name, step)

    def run(self, signals: Signals, board: Board | None) -> None:
        """Take the steps that are left, and leave a checkpoint of the last one.

        Raises:
            Stopped: a signal came; the state was saved.
            ValueError: bad data, too many bad steps in a row, or a checkpoint that could not be written.
        """
        stage, steps = self.stage, self.stage.steps
        if self.step >= steps:
            return
        prefetcher = Prefetcher(self.data, stage.sequences)
        try:
            with progress_bar(stage.name, steps, self.step, self.quiet) as bar:
                while self.step < steps:
                    record = self._take(prefetcher.next(more=self.step + 1 < steps))
                    if self.folder is not None and board is not None:
                        self.folder.log(record)
                        board.add(stage.name, record["step"], record)
                    bar.advance(
                        f"loss {record['loss']:.3f}" + (" (not applied)" if record["skipped"] else "")
                    )
                    self._check_patience(record)
                    self._save_or_stop(signals)
        finally:
            prefetcher.close()

    def _take(self, batch: StepBatch) -> dict[str, Any]:
        """One step; returns its line of metrics."""
        start = time.perf_counter()
        loss = accumulate(self.loss_of_row, batch, self.together, self.mesh)
        norm = clip_gradients(self.model, self.recipe.optimizer.clip)
        lr = self.stage.schedule.rate(self.step, self.stage.steps)
        set_rate(self.optimizer, lr)
        skipped = self.guard.check(loss, norm)
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        tokens = self.stage.sequences * self.stage.sequence
        self.step, self.tokens, self.position = self.step + 1, self.tokens + tokens, batch.position
        return {
            "phase": self.stage.name,
            "step": self.step - 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "skipped": skipped,
            "tokens": self.tokens,
            "targets": batch.targets,
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops.of(batch) / seconds / (self.flops_per_second * self.mesh.world),
            "peak_memory": peak_memory(self.mesh.device),
            "bad_documents": batch.skipped,
        }

    def _check_patience(self, record: dict[str, Any]) -> None:
        if not self.guard.exhausted:
            return
        last = self.checkpoints.all()
        kept = f"the last checkpoint is {last[-1].path}" if last else "nothing was saved yet"
        raise ValueError(
            f"{self.stage.name} step {record['step']}: {self.guard.in_a_row} steps in a row could not be "
            "applied, the last because "
            f"{record['skipped']}; {kept}. Try a lower {self.stage.name}.peak, or look for the cause in "
            "the data"
        )

    def _save_or_stop(self, signals: Signals) -> None:
        came = signals.came
        if self.mesh.world > 1:  # one rank may have heard it a step before the others
            came = int(total_over_ranks(float(came), self.mesh) / self.mesh.world + 0.999)
        if came or self.step % self.recipe.save_every == 0 or self.step == self.stage.steps:
            path = self.save()
            if came:
                name = signal.Signals(signals.came or signal.SIGTERM).name
                raise Stopped(
                    signals.came or signal.SIGTERM,
                    f"stopped by {name} after step {self.step} of {self.stage.name}; saved {path}: "
                    "go on with --resume",
                )

    def save(self) -> Any:
        """Write a checkpoint of this step."""
        extra = {
            "stage": self.stage.name,
            "step": self.step,
            "tokens": self.tokens,
            "guard": self.guard.state_dict(),
            "data": self.position,
        }
        return self.checkpoints.save(
            self.index, self.stage.name, self.step, self.model, self.optimizer, self.mesh, extra
        )


def prepared(model: MiniCPMSALAForCausalLM, recipe: Recipe, stage: Stage, mesh: ParallelMesh) -> Any:
    """The model ready for a stage: attention mode, recomputing, sequences and weights over ranks, compute
    dtype."""
    model.train().requires_grad_(True)
    if not stage.dense_start:
        model.set_attention_mode("auto" if stage.sparse else "dense")
    if recipe.recompute:
        recompute_layers(model)
    if mesh.cp > 1:
        context_parallel(model, mesh)
    if mesh.world > 1 or recipe.dtype != "float32":
        return shard_model(
            model, mesh, compute_dtype=None if recipe.dtype == "float32" else getattr(torch, recipe.dtype)
        )
    return model.to(mesh.device)
