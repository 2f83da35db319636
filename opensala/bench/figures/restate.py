"""Put what was measured where the documents state it, and into the registry with it.

Only numbers change. What a sentence concludes from them (met, missed, twice as fast) is for whoever reads the
difference to bring up to date.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from .registry import FIGURES, ROOT, Figure, Row, read_figures, stated_at


def restate(
    rows: Mapping[str, Sequence[Row]], root: Path = ROOT, registry: Path = FIGURES
) -> tuple[int, list[str]]:
    """Rewrite documents and registry.

    Args:
        rows: of each step that was measured, by name; figures of other steps stay.
        root: where the documents lie.
        registry: the registry's file.

    Returns:
        How many numbers changed, and a sentence for each line that was left as it was for a reason.
    """
    source, changed, left = registry.read_text(encoding="utf-8"), 0, []
    pages: dict[str, str] = {}
    lines: dict[tuple[str, str], list[Figure]] = {}
    for figure in read_figures(tomllib.loads(source)):
        lines.setdefault((figure.document, figure.text), []).append(figure)
    for (document, text), figures in lines.items():
        page = pages.setdefault(document, (root / document).read_text(encoding="utf-8"))
        if page.count(text) != 1:
            left.append(f"{document} has {text!r} {page.count(text)} times")
            continue
        values = [figure.value(rows.get(figure.step, ())) for figure in figures]
        found = [
            f.stated if v is None else written(v, f.stated) for f, v in zip(figures, values, strict=True)
        ]
        left += [
            f"{document}: {f.step} has no row for {f.stated} in {text!r}"
            for f, v in zip(figures, values, strict=True)
            if v is None and f.step in rows
        ]
        places = _places(text, [figure.stated for figure in figures])
        if places is None:
            left.append(f"{document}: the numbers of {text!r} are not in the order of its figures")
            continue
        new = text
        for (begin, end), number in sorted(zip(places, found, strict=True), reverse=True):
            new = new[:begin] + number + new[end:]
        source = _in_registry(source, document, text, new, figures, found)
        pages[document] = page.replace(text, new)
        changed += sum(f.stated != number for f, number in zip(figures, found, strict=True))
    for document, page in pages.items():
        (root / document).write_text(page, encoding="utf-8")
    registry.write_text(source, encoding="utf-8")
    return changed, left


def written(value: float, like: str) -> str:
    """A number as a document writes it: three significant digits, two for a whole number of two, and more
    where `like` has more. Written once, it is written so again."""
    digits = like.replace(",", "").replace(".", "").lstrip("0")
    if "." not in like:
        digits = digits.rstrip("0")
    whole = 9.5 <= value < 100 and "." not in like
    count = max(2 if whole else 3, len(digits))
    if value == 0:
        return "0"
    rounded = float(f"{value:.{count - 1}e}")
    decimals = max(0, count - 1 - int(f"{rounded:e}".partition("e")[2]))
    return f"{rounded:,.{decimals}f}"


def _places(text: str, stated: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the numbers stand in a line: each behind the one before, or where it stands alone."""
    found: list[tuple[int, int]] = []
    for number in stated:
        free = [place for place in stated_at(number, text) if place not in found]
        behind = [place for place in free if not found or place[0] > found[-1][0]]
        if not free or (not behind and len(free) > 1):
            return None
        found.append((behind or free)[0])
    return found


def _in_registry(
    source: str, document: str, text: str, new: str, figures: Sequence[Figure], found: Sequence[str]
) -> str:
    """The registry's file with the line's entries as they are now."""
    numbers = iter(zip(figures, found, strict=True))
    parts = source.split("\n\n")
    for n, part in enumerate(parts):
        if f'document = "{document}"\ntext = "{text}"\n' not in part or "[[line]]" not in part:
            continue
        part = part.replace(f'text = "{text}"', f'text = "{new}"')
        head, opening, body = part.partition("figures = [\n")
        for line in re.findall(r'^  ".+",$', body, re.MULTILINE):
            figure, number = next(numbers)
            body = body.replace(line, line.replace(f'"{figure.stated} = ', f'"{number} = ', 1), 1)
        parts[n] = head + opening + body
    return "\n\n".join(parts)
