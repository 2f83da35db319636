"""One evaluation from end to end: check, open the results, run what is missing, sum up."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.prompts import PromptFormat
from ..engine import Engine
from ..runs import FolderLock, write_errors, write_json
from .provenance import circumstances, identity
from .results import Results, summarize
from .runner import check_reach, run
from .samples import Suite


def evaluate(
    engine: Engine,
    suites: Sequence[Suite],
    folder: Path,
    *,
    chat: bool | None = None,
    strip_thoughts: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run suites into a folder of results, or finish what is there, and return the summary (see
    `results.summarize`).

    Raises:
        ValueError: prompts that memory cannot hold; a folder with other results, one that another process
            works in, or one that cannot be written; what the suites refuse.
    """
    with FolderLock(folder), write_errors(folder, "run the same command again"):
        form = PromptFormat(engine.tokenizer, chat)
        for note in check_reach(engine, suites):
            print(f"note: {note}", file=sys.stderr)
        whose = identity(engine, form.uses_chat) | {"thoughts stripped": strip_thoughts}
        results = Results(folder, whose, {s.name: s.settings() for s in suites}, circumstances(engine))
        if results.rows and not quiet:
            print(f"going on: {folder} holds {len(results.rows)} samples", file=sys.stderr)
        run(engine, suites, results, form, strip_thoughts=strip_thoughts, quiet=quiet)
        summary = summarize(results.rows.values())
        write_json(folder / "summary.json", results.header | summary)
    return summary
