"""A report's Markdown as one HTML file with its pictures inside: headings, lists, tables, bold, code and
pictures, nothing more."""

import base64
import html
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 "
    "1rem;color:#222}table{border-collapse:collapse;margin:1rem 0;"
    "display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.25rem "
    ".6rem;text-align:left}td.n,th.n{text-align:right}"
    "img{max-width:100%}code{background:#f2f2f2;padding:0 .2em}"
)
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def to_html(markdown: str, folder: Path, title: str) -> str:
    """A whole page; pictures are read from `folder`."""
    body = "\n".join(_blocks(markdown, folder))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _blocks(markdown: str, folder: Path) -> Iterator[str]:
    for kind, group in groupby(markdown.split("\n"), _kind):
        lines = list(group)
        if kind == "heading":
            for line in lines:
                level = len(line) - len(line.lstrip("#"))
                yield f"<h{level}>{_inline(line.lstrip('# '))}</h{level}>"
        elif kind == "list":
            yield "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
        elif kind == "table":
            yield _table(lines)
        elif kind == "picture":
            yield from (_picture(line, folder) for line in lines)
        elif kind == "text":
            yield f"<p>{_inline(' '.join(lines))}</p>"


def _kind(line: str) -> str:
    for start, kind in (("#", "heading"), ("- ", "list"), ("|", "table"), ("![", "picture")):
        if line.startswith(start):
            return kind
    return "text" if line.strip() else "space"


def _table(lines: list[str]) -> str:
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    right = [c.endswith(":") for c in cells[1]]

    def line(tag: str, row: list[str]) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=n' if n else ''}>{_inline(c)}</{tag}>"
                for c, n in zip(row, right, strict=False)
            )
            + "</tr>"
        )

    body = "".join(line("td", row) for row in cells[2:])
    return f"<table><thead>{line('th', cells[0])}</thead><tbody>{body}</tbody></table>"


def _picture(line: str, folder: Path) -> str:
    found = _PICTURE.match(line)
    if found is None:
        return f"<p>{_inline(line)}</p>"
    data = base64.b64encode((folder / found[2]).read_bytes()).decode()
    return f'<p><img alt="{html.escape(found[1])}" src="data:image/png;base64,{data}"></p>'


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
