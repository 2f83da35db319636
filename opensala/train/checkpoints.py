"""The checkpoints of a run: where they are, which is the last, how many are kept, what a full disk means for
them.

    checkpoints/03-short_decay-0000250/    place of the stage in the recipe, its name, optimizer steps taken
    in it

Each is written beside its place and renamed (opensala.parallel), so that whatever has the name is
whole.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..parallel import ParallelMesh, load_checkpoint, save_checkpoint

_NAME = re.compile(r"(\d+)-(.+)-(\d{7,})")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """One that is whole. They sort by age."""

    index: int
    step: int
    stage: str
    path: Path


class Checkpoints:
    """Those of one run folder.

    Args:
        folder: of the run.
        keep: how many of them stay, the newest.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder / "checkpoints", keep

    def all(self) -> list[Checkpoint]:
        """Oldest first."""
        found = []
        for path in self.folder.glob("*"):
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append(Checkpoint(int(match[1]), int(match[3]), match[2], path))
        return sorted(found)

    def last(self, stage: str) -> Checkpoint | None:
        """The newest of a stage."""
        own = [c for c in self.all() if c.stage == stage]
        return own[-1] if own else None

    def save(
        self,
        index: int,
        stage: str,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: ParallelMesh,
        extra: dict[str, Any],
    ) -> Path:
        """Write one on all ranks, then drop the oldest beyond `keep`.

        Raises:
            ValueError: it could not be written, disk full included; those before it are as they were.
        """
        path = self.folder / f"{index:02}-{stage}-{step:07}"
        if path.exists():  # an earlier run of this very step
            return path
        try:
            save_checkpoint(path, model, optimizer, mesh, extra)
        except OSError as error:
            raise ValueError(self._unwritten(path, error)) from error
        if mesh.rank == 0:
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old.path)
        return path

    def _unwritten(self, path: Path, error: OSError) -> str:
        known = self.all()
        last = f"the last good one, {known[-1].path}, is kept" if known else "there is none before it"
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        return (
            f"checkpoint {path} could not be written: {error.strerror or error}; {free:,} bytes are free "
            f"there; {last}. Free some space "
            f"(a checkpoint takes 12 bytes a parameter) and go on with --resume"
        )

    @staticmethod
    def load(
        checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Weights and optimizer state in place; returns what else was kept."""
        return load_checkpoint(checkpoint.path, model, optimizer)
