"""Which blocks the sparse layers selected for the tokens of an answer: noted for requests that ask for it."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .request import Completion, Selection
from .runner import Runner
from .scheduler import Work


def note_selection(
    runner: Runner, results: Iterable[tuple[Work, Sequence[object]]], completions: Mapping[str, Completion]
) -> None:
    """Note in the completions what was selected for the tokens that a step chose.

    Args:
        runner: that ran the step.
        results: the step's works in order, each with the tokens that were chosen by it.
        completions: by request id.

    A step with no request that wants to know costs a look at each of its works, and nothing on the device.
    """
    first, wanted = 0, []
    for work, chosen in results:
        done = completions[work.sequence.request_id]
        count = min(len(chosen), work.sequence.params.selection - len(done.selection))
        if count > 0:
            row = first + work.count - work.drafted - 1  # the query of the last token that was known
            place = work.sequence.num_cached + work.count - work.drafted - 1
            wanted += [(done, work.sparse, row + i, place + i) for i in range(count)]
        first += work.count
    if not wanted:
        return
    sparse = [row for _, is_sparse, row, _ in wanted if is_sparse]
    found = runner.selected(sparse) if sparse else {}
    number = 0
    for done, is_sparse, _, place in wanted:
        blocks: dict[int, np.ndarray] | None = None
        if is_sparse:
            blocks = {layer: rows[number] for layer, rows in found.items()}
            number += 1
        done.selection.append(Selection(place, blocks))
