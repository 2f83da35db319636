"""From the text of an answer, piece by piece, to calls of tools and what is said beside them.

A call is told as it is written: its name first, then its arguments as they come. What looks like a call and
turns out to be none (of a tool that nobody offered, or JSON that does not end) is text.
"""

import ast
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .tools import CallForm

_BETWEEN = " \t\n,;[]"  # what stands around calls in a list of them


@dataclass(frozen=True)
class Text:
    """Something said."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """The first or next call of an answer, by its number."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments' JSON."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnds:
    """The arguments are complete."""

    index: int


Part = Text | CallBegins | CallArguments | CallEnds


class CallReader:
    """Reads one answer.

    Args:
        form: how the model writes calls.
        names: tools that were offered.
        most: calls to read at most; None for any number. What comes behind the last one is left out.
    """

    def __init__(self, form: CallForm, names: Collection[str], most: int | None = None) -> None:
        self.form, self.names, self.most = form, names, most
        self.num_calls = 0
        self._marker, self._after = form.marker, form.after.strip()
        self._text = ""  # not told yet
        self._blanks = ""  # behind what was said: nothing if a call follows
        self._said = False
        self._opening = ""  # the marker that stands before what is read, until a call was
        self._state = self._in_text if self._marker else self._at_begin
        self._scan = _Scan()
        key = re.escape(form.pieces[1].split('"')[-2]) if form.kind == "json" else ""
        self._head = re.compile(rf'\{{\s*"name"\s*:\s*"([\w-]+)"\s*,\s*"{key}"\s*:\s*(?=\{{)')

    @property
    def is_full(self) -> bool:
        """Whether all calls that may be were read."""
        return self.most is not None and self.num_calls >= self.most and self._state != self._in_arguments

    def add(self, text: str, last: bool = False) -> list[Part]:
        """Take a piece of the answer, the last one or not; returns what is certain now."""
        self._text += text
        parts: list[Part] = []
        while not self.is_full and self._state(parts, last):
            pass
        if self.is_full:
            self._text = ""
        if last and self._text:
            self._say(self._text, parts)
            self._text = ""
        return parts

    # --- states: each takes what it can from `_text`; True if the next one has something to do ---

    def _at_begin(self, parts: list[Part], last: bool) -> bool:
        """An answer is a call from its first character, or none at all."""
        start = self._text.lstrip()
        if not start:
            return False
        self._state = self._in_call if start.startswith("{") else self._only_text
        return True

    def _only_text(self, parts: list[Part], last: bool) -> bool:
        self._say(self._text, parts)
        self._text = ""
        return False

    def _in_text(self, parts: list[Part], last: bool) -> bool:
        place = self._text.find(self._marker)
        if place < 0:
            held = 0 if last else _overlap(self._text, self._marker)
            self._say(self._text[: len(self._text) - held], parts)
            self._text = self._text[len(self._text) - held :]
            return False
        self._say(self._text[:place], parts)
        self._text = self._text[place + len(self._marker) :]
        self._opening, self._state = self._marker, self._in_call
        return True

    def _in_call(self, parts: list[Part], last: bool) -> bool:
        """Behind a marker, or behind a call that followed it."""
        if self.form.kind == "python":
            return self._python(parts, last)
        rest = self._text.lstrip(" \t\n")
        if self._after and rest.startswith(self._after):
            self._text, self._state = rest[len(self._after) :], self._in_text
            return True
        if self._after.startswith(rest) or not rest.strip(_BETWEEN):  # its end is to come, if it comes
            self._text = "" if last else self._text
            return False
        rest = rest.lstrip(_BETWEEN)
        head = self._head.match(rest)
        if head and head[1] in self.names:
            self._begin(head[1], parts)
            self._text, self._scan, self._state = rest[head.end() :], _Scan(), self._in_arguments
            return True
        return self._whole(rest, parts, last)

    def _in_arguments(self, parts: list[Part], last: bool) -> bool:
        size = self._scan.take(self._text)
        if size:
            parts.append(CallArguments(self.num_calls - 1, self._text[:size]))
        self._text = self._text[size:]
        if not self._scan.is_done:
            return False
        parts.append(CallEnds(self.num_calls - 1))
        self._scan, self._state = _Scan(depth=1), self._behind_arguments
        return True

    def _behind_arguments(self, parts: list[Part], last: bool) -> bool:
        """The rest of the object that the arguments stood in."""
        self._text = self._text[self._scan.take(self._text) :]
        if self._scan.is_done:
            self._state = self._in_call
        return self._scan.is_done

    def _whole(self, rest: str, parts: list[Part], last: bool) -> bool:
        """A call whose parts come in another order, once it is complete; else it was no call."""
        scan = _Scan()
        size = scan.take(rest) if rest.startswith("{") else 0
        if rest.startswith("{") and not scan.is_done and not last:
            return False
        call = _json_call(rest[:size], self.names) if scan.is_done else None
        if call is None:
            self._say(self._opening + self._text, parts)
            self._text, self._state = "", self._in_text if self._marker else self._only_text
            return False
        self._complete(*call, parts)
        self._text = rest[size:]
        return True

    def _python(self, parts: list[Part], last: bool) -> bool:
        """Calls up to the marker behind them."""
        end = self._text.find(self._after) if self._after else -1
        if end < 0 and not last:
            return False
        source = self._text[: end if end >= 0 else len(self._text)]
        calls = _python_calls(source.strip(), self.names)
        if calls is None:
            self._say(self._marker + source + (self._after if end >= 0 else ""), parts)
        for name, arguments in calls or []:
            if not self.is_full:
                self._complete(name, arguments, parts)
        self._text = self._text[end + len(self._after) :] if end >= 0 else ""
        self._state = self._in_text
        return end >= 0

    # --- what is told ---

    def _say(self, text: str, parts: list[Part]) -> None:
        """Text, without blanks before the first word and before a call."""
        text = self._blanks + text if self._said else text.lstrip()
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        if kept:
            self._said = True
            parts.append(Text(kept))

    def _begin(self, name: str, parts: list[Part]) -> None:
        self._blanks = self._opening = ""
        parts.append(CallBegins(self.num_calls, name))
        self.num_calls += 1

    def _complete(self, name: str, arguments: dict[str, Any], parts: list[Part]) -> None:
        self._begin(name, parts)
        index = self.num_calls - 1
        parts += [CallArguments(index, json.dumps(arguments, ensure_ascii=False)), CallEnds(index)]


class _Scan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self.depth, self.is_done = depth, False
        self._in_string = self._escaped = False

    def take(self, text: str) -> int:
        """Characters of `text` that belong to the object."""
        for place, letter in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if not self.depth:
                    self.is_done = True
                    return place + 1
        return len(text)


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of `text` that `marker` may begin with."""
    most = min(len(marker) - 1, len(text))
    return next((size for size in range(most, 0, -1) if text.endswith(marker[:size])), 0)


def _json_call(text: str, names: Collection[str]) -> tuple[str, dict[str, Any]] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    name, arguments = found.get("name"), found.get("arguments", found.get("parameters"))
    known = isinstance(name, str) and name in names and isinstance(arguments, dict)
    return (name, arguments) if known else None


def _python_calls(source: str, names: Collection[str]) -> list[tuple[str, dict[str, Any]]] | None:
    """Calls in Python, one a line or in a list; None if that is not what it is."""
    try:
        body = ast.parse(source).body
        expressions = [node.value for node in body if isinstance(node, ast.Expr)]
        nodes = [e for x in expressions for e in (x.elts if isinstance(x, (ast.List, ast.Tuple)) else [x])]
        calls = [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # what ast has for odd sources
        return None
    if len(expressions) < len(body) or not calls or any(name not in names for name, _ in calls):
        return None
    return calls


def _python_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("not a call by names")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("arguments without names")
    named = {str(keyword.arg): ast.literal_eval(_Words().visit(keyword.value)) for keyword in node.keywords}
    json.dumps(named, allow_nan=False)  # sets, bytes and the like are no arguments
    return node.func.id, named


class _Words(ast.NodeTransformer):
    """JSON's words for Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node
