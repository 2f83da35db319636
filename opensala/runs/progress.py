"""What a run shows while it works: progress bars on stderr; and whether its plots can be made at all."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """A progress bar that counts steps and shows the last figures."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, note="")

    def advance(self, note: str = "") -> None:
        self._progress.update(self._task, advance=1, note=note)


@contextmanager
def progress_bar(label: str, total: int, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """Show a bar on stderr while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr), disable=quiet) as progress:
        yield Bar(progress, label, total, done)


@contextmanager
def counter(label: str, quiet: bool = False) -> Iterator[Callable[[int, str], None]]:
    """Show a growing count on stderr while the block runs; call it with what was added and a note."""
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.fields[note]}"), console=Console(file=sys.stderr), disable=quiet
    ) as progress:
        task = progress.add_task(label, total=None, note="")
        yield lambda count, note: progress.update(task, advance=count, note=note)


def require_matplotlib() -> None:
    """Raise ValueError with the command to run if plots cannot be made: before the work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the run's plots need matplotlib: pip install 'opensala[train]'")
