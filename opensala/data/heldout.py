"""Texts that were held out of a training corpus."""

import json
from collections import defaultdict
from pathlib import Path


def texts_by_group(path: Path) -> dict[str, list[str]]:
    """The documents of a file of JSON lines of `text` and `group` (kind of text), as
    `scripts/corpus/build.py` writes: by group, in the order of the file.

    Raises:
        ValueError: a line that is something else.
    """
    found: dict[str, list[str]] = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                document = json.loads(line)
                group, text = document["group"], document["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f'{path}, line {number}: must be a JSON object like {{"text": "...", "group": "..."}}'
                ) from None
            found[group].append(text)
    return dict(sorted(found.items()))
