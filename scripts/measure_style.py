"""Sizes of files and functions, widths of lines, shares of comments and docstrings: a row for docs/log.md.

    python scripts/measure_style.py
    python scripts/measure_style.py opensala/engine tests

Each folder gives one row. Lines are counted as they stand, empty ones included, but widths are those of lines
that are not empty. A function runs from its `def` to its last line; nested functions count on their own too.
The share of comments is that of lines with a comment, alone or behind code; the share of docstrings that of
the lines they span.
"""

import ast
import datetime
import io
import math
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

COLUMNS = (
    "date",
    "folder",
    "files",
    "lines",
    "lines per file, p50 / p90 / max",
    "lines per function",
    "functions over 45 lines",
    "width",
    "comments",
    "docstrings",
)


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least `share` of `values` do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0


def spread(values: list[int]) -> str:
    return f"{percentile(values, 0.5)} / {percentile(values, 0.9)} / {max(values, default=0)}"


def function_lengths(tree: ast.AST) -> list[int]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]


def docstring_lines(tree: ast.AST) -> int:
    """Lines that docstrings of modules, classes and functions span."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    strings = [
        n.body[0]
        for n in ast.walk(tree)
        if isinstance(n, documented) and ast.get_docstring(n, clean=False) is not None
    ]
    return sum((string.end_lineno or string.lineno) - string.lineno + 1 for string in strings)


def comment_lines(text: str) -> int:
    return sum(
        token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )


def measure(folder: Path) -> str:
    """One row of the table for all Python files below `folder`."""
    texts = [path.read_text() for path in sorted(folder.rglob("*.py"))]
    if not texts:
        raise typer.BadParameter(f"{folder} has no Python file: name a folder with sources")
    trees = [ast.parse(text) for text in texts]
    lines = [line for text in texts for line in text.splitlines()]
    functions = [length for tree in trees for length in function_lengths(tree)]
    comments = sum(map(comment_lines, texts)) / len(lines)
    docstrings = sum(map(docstring_lines, trees)) / len(lines)
    cells = [
        datetime.date.today().isoformat(),
        folder.as_posix(),
        str(len(texts)),
        f"{len(lines):,}",
        spread([len(text.splitlines()) for text in texts]),
        spread(functions),
        str(sum(length > 45 for length in functions)),
        spread([len(line) for line in lines if line.strip()]),
        f"{comments:.1%}",
        f"{docstrings:.1%}",
    ]
    return row(cells)


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(folders: Annotated[list[Path] | None, typer.Argument()] = None) -> None:
    typer.echo(row(COLUMNS))
    typer.echo("|" + "---|" * len(COLUMNS))
    for folder in folders or [Path("opensala"), Path("tests"), Path("scripts")]:
        typer.echo(measure(folder))


if __name__ == "__main__":
    typer.run(main)
