"""The progress bar of long work, on stderr: share done, tokens a second, time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_PERIOD = 300.0  # seconds that count as of late: a step of a long text may take a minute


class _Rate(ProgressColumn):
    """Of late while it runs; of the whole when it is done: a last step of one token takes no time."""

    def render(self, task: Task) -> Text:
        speed = task.completed / task.finished_time if task.finished_time else task.speed
        return Text("" if not speed else f"{speed:,.0f} tokens/s")


@contextmanager
def token_progress(label: str, total: int, quiet: bool = False) -> Iterator["Advance"]:
    """Show a bar for `total` tokens while the block runs; yields the function that advances it."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=quiet, speed_estimate_period=_PERIOD) as bar:
        task = bar.add_task(label, total=total)
        yield Advance(bar, task)


class Advance:
    """Callable that moves a bar forward by a number of tokens."""

    def __init__(self, bar: Progress, task: object) -> None:
        self._bar, self._task = bar, task

    def __call__(self, tokens: int) -> None:
        self._bar.advance(self._task, tokens)  # type: ignore[arg-type]
