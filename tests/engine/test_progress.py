"""What the bar says of long work."""

import pytest
from rich.progress import Progress

from opensala.engine.progress import _Rate


def test_the_rate_of_what_is_done_is_that_of_the_whole():
    """Pieces of a minute each, and a last token that takes no time."""
    now, column = 0.0, _Rate()
    with Progress(disable=True, get_time=lambda: now, speed_estimate_period=300) as bar:
        task = bar.add_task("a text", total=6001)
        for _ in range(3):
            now += 60
            bar.advance(task, 2000)
        assert column.render(bar.tasks[0]).plain == f"{2000 / 60:,.0f} tokens/s"
        now += 0.0001
        bar.advance(task, 1)
        assert bar.tasks[0].finished_time == pytest.approx(180)
        assert column.render(bar.tasks[0]).plain == f"{6001 / 180:,.0f} tokens/s"
