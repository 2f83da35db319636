"""The folder of a run: its configuration, metrics, checkpoints and results. Everything is written whole or
not at all.

config.json     the configuration; a resumed run must have the same
metrics.jsonl   one line per step
align.pt, distill.pt   the state of each phase: weights, optimizer, step, random state
scores.json, selection.json, result.json, plots/   what came out
model/          the hybrid
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import torch

_NAMED = 8  # differences that are written out


class Configuration(Protocol):
    """What a run is: anything that can be written as JSON and compared."""

    def as_dict(self) -> dict[str, Any]: ...


def flatten(record: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists under dotted names; an empty one is a leaf."""
    items = (
        record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    )
    leaves = {name: leaf for key, value in items for name, leaf in flatten(value, f"{prefix}{key}.").items()}
    return leaves or {prefix.removesuffix("."): record}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, flush it to disk, then put it there."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, record: object) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))


def read_json(path: Path) -> Any:
    """The parsed file, or None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last line cut short by a kill is left out."""
    file, records = folder / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class RunFolder:
    """Open the folder of a run: a new one, or with `resume` one of the very same configuration. `kind` is for
    messages.

    Raises:
        ValueError: a folder that holds something else, a run without `resume`, or a run of another
            configuration (naming the fields that differ).
    """

    def __init__(
        self, path: str | Path, config: Configuration, resume: bool, kind: str = "conversion"
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{path} is a file: give a folder for the run")
        known = read_json(self.path / "config.json")
        if known is None and self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no {kind}: give a new folder")
        if known is not None:
            self._compare(known, config.as_dict())
            if not resume:
                raise ValueError(
                    f"{path} holds this run already: add --resume to go on with it, or give another folder"
                )
        (self.path / "plots").mkdir(parents=True, exist_ok=True)
        write_json(self.path / "config.json", config.as_dict())
        self._metrics: IO[str] | None = None

    def _compare(self, known: dict[str, Any], wanted: dict[str, Any]) -> None:
        there, here = flatten(known), flatten(wanted)
        different = [
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted({*there, *here})
            if there.get(key) != here.get(key)
        ]
        if different:
            if len(different) > _NAMED:
                different[_NAMED:] = [f"and {len(different) - _NAMED} more"]
            raise ValueError(
                f"{self.path} is a run of another configuration: {'; '.join(different)}. "
                "Give its options again, or another folder"
            )

    # --- checkpoints ---

    def save_state(self, phase: str, state: dict[str, Any]) -> None:
        """Write the state of a phase with the random state."""
        record = {**state, "rng": torch.get_rng_state()}
        write_whole(self.path / f"{phase}.pt", lambda partial: torch.save(record, partial))

    def load_state(self, phase: str) -> dict[str, Any] | None:
        """The last saved state of a phase; sets the random state. None if there is none."""
        file = self.path / f"{phase}.pt"
        if not file.exists():
            return None
        state = torch.load(file, weights_only=True, map_location="cpu")
        torch.set_rng_state(state.pop("rng"))
        return state

    # --- metrics ---

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115 -- open for as long as the run lasts
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def metrics(self, phase: str | None = None) -> list[dict[str, Any]]:
        """All lines, or those of a phase. See `read_metrics`."""
        return [r for r in read_metrics(self.path) if phase is None or r["phase"] == phase]

    def forget_after(self, phase: str, step: int) -> None:
        """Drop metrics of a phase from `step` on: those steps were lost and will be taken again."""
        self.close()
        kept = [r for r in self.metrics() if r["phase"] != phase or r["step"] < step]
        text = "".join(json.dumps(r) + "\n" for r in kept)
        write_whole(self.path / "metrics.jsonl", lambda partial: partial.write_text(text))

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
