"""What a conversion keeps so that it can go on: the state of each phase, written by all ranks and read by any
number of them.

    states/distill-0000300/    the phase, optimizer steps taken in it

Each is written beside its place and renamed (`opensala.parallel`), so that whatever has the name is whole;
the one before it goes then.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..parallel import ParallelMesh, load_checkpoint, save_checkpoint
from ..parallel.checkpoint import STATE_FILE

_NAME = re.compile(r"(.+)-(\d{7,})")


class States:
    """The saved states of one run folder.

    Args:
        folder: of the run.
        mesh: the ranks, or None to look only.
    """

    def __init__(self, folder: Path, mesh: ParallelMesh | None = None) -> None:
        self.folder, self.mesh = folder / "states", mesh

    def last(self, phase: str) -> Path | None:
        """The newest state of a phase."""
        found = []
        for path in self.folder.glob("*"):
            match = _NAME.fullmatch(path.name)
            if match and match[1] == phase and (path / STATE_FILE).is_file():
                found.append((int(match[2]), path))
        return max(found)[1] if found else None

    def note(self, phase: str) -> dict[str, Any] | None:
        """What was kept beside the tensors of a phase's newest state: its step, and whether it is over."""
        path = self.last(phase)
        return None if path is None else json.loads((path / STATE_FILE).read_text())["extra"]

    def load(
        self, phase: str, module: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any] | None:
        """Put a phase's newest state in place, if there is one; returns its note."""
        path = self.last(phase)
        return None if path is None else load_checkpoint(path, module, optimizer, trained_only=True)

    def save(
        self,
        phase: str,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        note: dict[str, Any],
    ) -> None:
        """Write a state on all ranks, what is trained of a module with its optimizer, and drop the one before
        it.

        Raises OSError where it cannot be written; the one before it stays.
        """
        assert self.mesh is not None, "states are written by ranks"
        path, before = self.folder / f"{phase}-{step:07}", self.last(phase)
        if path == before:  # by an earlier process, of this very step
            return
        save_checkpoint(path, module, optimizer, self.mesh, {"step": step, **note}, trained_only=True)
        if before is not None and self.mesh.rank == 0:
            shutil.rmtree(before)

    def take_over(self, other: "States", phase: str) -> None:
        """Copy a phase's newest state from another run; for one rank."""
        source = other.last(phase)
        assert source is not None, "looked for before"
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / f"{source.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.replace(self.folder / source.name)
