"""The folder of a run: its configuration, metrics, checkpoints and results. Everything is written whole or
not at all.

config.json     the configuration; a resumed run must have the same
metrics.jsonl   one line per step
states/         the state of each phase (opensala.convert.states)
scores.json, selection.json, result.json, plots/   what came out
model/          the hybrid
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from safetensors import SafetensorError

from .lock import LOCK_FILE, FolderLock

_NAMED = 8  # differences that are written out
_PREPARED = {
    LOCK_FILE,
    "config.json",
    "compute.json",
    "metrics.jsonl",
    "plots",
    "tensorboard",
    "texts",
}  # before any step


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
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError):
        partial.unlink(missing_ok=True)  # a full disk is not kept full
        raise


def write_json(path: Path, record: object) -> None:
    write_whole(
        path,
        lambda partial: partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8"),
    )


def read_json(path: Path) -> Any:
    """The parsed file, or None if there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


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
    """Open and lock the folder of a run: a new one, or with `resume` one of the very same configuration.
    `kind` is for messages.

    Raises:
        ValueError: a folder that holds something else, a run without `resume`, no run with it, a run of
            another configuration (naming the fields that differ), one that another process works in, or one
            that cannot be written.
    """

    def __init__(
        self, path: str | Path, config: Configuration, resume: bool, kind: str = "conversion"
    ) -> None:
        self.path, self.config = Path(path), config
        self._metrics: IO[str] | None = None
        self._lock = FolderLock(self.path)
        self._new = not (self.path / "config.json").exists()
        try:
            self._check(resume, kind)
            (self.path / "plots").mkdir(exist_ok=True)
            write_json(self.path / "config.json", config.as_dict())
        except (OSError, ValueError):
            self._lock.release()
            raise

    def _check(self, resume: bool, kind: str) -> None:
        known = read_json(self.path / "config.json")
        if known is None and any(p.name != LOCK_FILE for p in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no {kind}: give a new folder")
        if known is None and resume:
            raise ValueError(
                f"{self.path} holds no {kind} to resume: check its name, or omit --resume to begin"
            )
        if known is not None:
            self._compare(known, self.config.as_dict())
            if not resume:
                raise ValueError(
                    f"{self.path} holds this run already: add --resume to go on with it, or give another "
                    "folder"
                )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Work in the folder during the block and let it go after it. A new run that is refused before its
        first step leaves nothing behind: its configuration would refuse the right options later."""
        try:
            yield
        except ValueError:
            self.forget_unbegun()
            raise
        finally:
            self.close()

    def forget_unbegun(self) -> None:
        """Leave nothing behind of a new run that has computed nothing yet."""
        if self._new and not self._begun():
            self._forget()

    def _begun(self) -> bool:
        """Whether anything was computed: a step, a state, a result, a run inside this one."""
        others = {p for p in self.path.iterdir() if p.name not in _PREPARED}
        return bool(others or read_metrics(self.path) or any((self.path / "plots").iterdir()))

    def _forget(self) -> None:
        self._close_metrics()
        for name in _PREPARED - {LOCK_FILE}:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

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

    # --- metrics ---

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        if self._metrics is None:
            # open for as long as the run lasts
            self._metrics = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def metrics(self, phase: str | None = None) -> list[dict[str, Any]]:
        """All lines, or those of a phase. See `read_metrics`."""
        return [r for r in read_metrics(self.path) if phase is None or r["phase"] == phase]

    def forget_after(self, phase: str, step: int) -> None:
        """Drop metrics of a phase from `step` on: those steps were lost and will be taken again."""
        self._close_metrics()
        kept = [r for r in self.metrics() if r["phase"] != phase or r["step"] < step]
        text = "".join(json.dumps(r) + "\n" for r in kept)
        write_whole(self.path / "metrics.jsonl", lambda partial: partial.write_text(text))

    def close(self) -> None:
        """Let the folder go for other runs."""
        self._close_metrics()
        self._lock.release()

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
