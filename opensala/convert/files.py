"""The folder of a conversion, seen from one of its processes: the first one writes, all of them read."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runs import RunFolder, read_json, write_json
from .ranks import Ranks
from .states import States

logger = logging.getLogger("opensala")


class RunFiles:
    """Records, metrics and states of a run.

    Args:
        path: of the run.
        folder: the same, held by the first rank; None on the others.
        ranks: the processes. Each of them calls every method.
    """

    def __init__(self, path: Path, folder: RunFolder | None, ranks: Ranks) -> None:
        self.path, self.folder, self.ranks = path, folder, ranks
        self.states = States(path, ranks.mesh)

    def read(self, name: str) -> Any:
        """A JSON file, or None if there is none."""
        return self.ranks.first(lambda: read_json(self.path / name))

    def write(self, name: str, record: object) -> None:
        """Write a JSON file, whole or not at all."""
        self.ranks.first(lambda: write_json(self.path / name, record))

    def do(self, work: Callable[[], object]) -> None:
        """What is done to the folder once; the others wait for it, and learn of its errors."""
        self.ranks.first(lambda: (work(), None)[1])

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        if self.folder is not None:
            self.folder.log(record)

    def metrics(self, phase: str) -> list[dict[str, Any]]:
        """The lines of a phase, on the first rank; none on the others."""
        return [] if self.folder is None else self.folder.metrics(phase)

    def forget_after(self, phase: str, step: int) -> None:
        """Drop metrics of a phase from `step` on."""
        if self.folder is not None:
            self.folder.forget_after(phase, step)

    def note(self, phase: str) -> dict[str, Any] | None:
        """Of a phase's newest state; see `States.note`."""
        return self.ranks.first(lambda: self.states.note(phase))
