"""The figures of speed that README and docs state, and for each the rows of the step that measures it again.

`benchmarks/figures.toml` has them. A `[[line]]` is a line of a document, or a part of one (`text`), with the
step that gives its figures. Each of these is written `"STATED = FIELD where KEY=VALUE; KEY=VALUE"`: STATED as
the line has it, FIELD a column of the row that has those values. `FIELD * 1000` and `FIELD / 60` change the
unit, and `A // B` is the ratio of two such terms. An `[[elsewhere]]` is a line, or all rows of a table
(`table`: its header), whose figures no step measures, with the reason.
"""

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
FIGURES = ROOT / "benchmarks" / "figures.toml"
REASONS = ("gpu", "history", "by hand", "no speed")

Row = dict[str, Any]

# Where a table speaks of time or speed: a unit behind a number, or one in its header.
_UNIT = r"(?:s|ms|us|min|minutes?|seconds?|hours?|tokens/s|[GT]FLOP/s|GB/s|x faster)(?![\w/])"
_TIMED = re.compile(rf"\d\s?{_UNIT}|\d, \d[\d.]* ms")
_HEADER = re.compile(
    r"first token|decoding step|tokens/s|tokens per second|(?<![\w'])(?:s|ms)(?![\w'])|\bms per\b"
)
_ALL = ("docs/speed.md",)  # pages of which every row is one of speed


@dataclass(frozen=True)
class Term:
    """A number of a row: its column, the values that tell the row, and a factor."""

    field: str
    where: tuple[tuple[str, str], ...]
    factor: float = 1.0

    def value(self, rows: Sequence[Row]) -> float | None:
        """The number; None without a row of those values (the last one counts, of several)."""
        found = None
        for row in rows:
            if all(str(row.get(key)) == value for key, value in self.where) and _is_number(
                row.get(self.field)
            ):
                found = float(row[self.field]) * self.factor
        return found


@dataclass(frozen=True)
class Figure:
    """A number that a document states.

    Attributes:
        document: path from the repository's root.
        text: the line, or a part of it, that states it.
        stated: as it stands there.
        step: name of the step that measures it again.
        over, under: what it is; a ratio where there is an `under`.
    """

    document: str
    text: str
    stated: str
    step: str
    over: Term
    under: Term | None = None

    @property
    def number(self) -> float:
        """What is stated, as a number."""
        return float(self.stated.replace(",", ""))

    def value(self, rows: Sequence[Row]) -> float | None:
        """What the step's rows say; None where they do not."""
        over = self.over.value(rows)
        if self.under is None or over is None:
            return over
        under = self.under.value(rows)
        return over / under if under else None


@dataclass(frozen=True)
class Elsewhere:
    """A line, or the rows of a table, that no step measures: why, in a word of REASONS and in a sentence."""

    document: str
    text: str
    table: str
    reason: str
    why: str


@dataclass(frozen=True)
class Registry:
    """All figures."""

    figures: tuple[Figure, ...]
    elsewhere: tuple[Elsewhere, ...]

    def of_step(self, step: str) -> list[Figure]:
        return [figure for figure in self.figures if figure.step == step]

    def documents(self, step: str) -> list[str]:
        """The documents whose figures a step gives."""
        return sorted({figure.document for figure in self.of_step(step)})

    def missing(self, root: Path = ROOT) -> list[str]:
        """What is registered and stands in no document: a sentence for each."""
        pages: dict[str, str] = {}
        found = []
        entries = [(f.document, f.text, f.stated) for f in self.figures]
        entries += [(e.document, e.text or e.table, "") for e in self.elsewhere]
        for document, text, stated in entries:
            page = pages.setdefault(document, (root / document).read_text(encoding="utf-8"))
            if text not in page:
                found.append(f"{document} has no {text!r}")
            elif stated and not stated_at(stated, text):
                found.append(f"{document}: {stated} is not in {text!r}")
        return found

    def uncovered(self, document: str, root: Path = ROOT) -> list[str]:
        """Rows of a document's tables that speak of time or speed and are not registered."""
        lines = {f.text for f in self.figures if f.document == document}
        lines |= {e.text for e in self.elsewhere if e.document == document}
        tables = {e.table for e in self.elsewhere if e.document == document and e.table}
        page = (root / document).read_text(encoding="utf-8")
        return [
            row
            for header, row in speed_rows(page, document in _ALL)
            if header not in tables and not any(line and line in row for line in lines)
        ]


def speed_rows(page: str, every: bool = False) -> Iterable[tuple[str, str]]:
    """(header, row) of those rows of a Markdown page's tables that have figures of time or speed, as far as
    units tell; of all rows with a number if `every`."""
    header, before = "", ""
    for line in page.splitlines():
        if not line.startswith("|"):
            header = ""
        elif re.fullmatch(r"[|:\- ]+", line):
            header = before
        elif header and re.search(r"\d", line.split("|", 2)[2]) and (every or _speaks(header, line)):
            yield header, line
        before = line


def _speaks(header: str, row: str) -> bool:
    """Whether a row speaks of time or speed, by itself or by its header."""
    return bool(_TIMED.search(row) or _HEADER.search(header))


def stated_at(number: str, text: str) -> list[tuple[int, int]]:
    """Where a number stands in a line, as beginning and end, and not as part of another."""
    return [m.span() for m in re.finditer(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", text)]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _term(text: str) -> Term:
    field, _, where = text.strip().partition(" where ")
    change = re.fullmatch(r"(.+?) ([*/]) ([\d.]+)", field)
    factor = 1.0
    if change:
        field, factor = change[1], float(change[3]) ** (1 if change[2] == "*" else -1)
    pairs = (pair.partition("=") for pair in where.split("; ") if pair)
    return Term(field.strip(), tuple((key.strip(), value.strip()) for key, _, value in pairs), factor)


def _figure(document: str, text: str, step: str, line: str) -> Figure:
    stated, equals, formula = line.partition(" = ")
    if not equals or not _is_number(stated.replace(",", "")):
        raise ValueError(f"{document}, {text!r}: a figure is written NUMBER = FIELD where ..., got {line!r}")
    over, ratio, under = formula.partition(" // ")
    return Figure(document, text, stated, step, _term(over), _term(under) if ratio else None)


def read_figures(found: dict[str, Any]) -> tuple[Figure, ...]:
    """The figures of a registry's content, in its order."""
    return tuple(
        _figure(entry["document"], entry["text"], entry["step"], line)
        for entry in found.get("line", [])
        for line in entry["figures"]
    )


def read_registry(path: Path = FIGURES) -> Registry:
    """The registry of a file.

    Raises:
        ValueError: an entry that cannot be read, with the document and the line.
    """
    with open(path, "rb") as file:
        found = tomllib.load(file)
    figures = read_figures(found)
    elsewhere = tuple(
        Elsewhere(e["document"], e.get("text", ""), e.get("table", ""), e["reason"], e["why"])
        for e in found.get("elsewhere", [])
    )
    for entry in elsewhere:
        if entry.reason not in REASONS or bool(entry.text) == bool(entry.table):
            raise ValueError(
                f"{entry.document}, {entry.text or entry.table!r}: an [[elsewhere]] has a text or a table, "
                f"and a reason of {', '.join(REASONS)}"
            )
    return Registry(figures, elsewhere)
