"""Tools that a model may call: how its chat template writes calls, and a grammar that forces one.

The form of a call is found out from the template itself: it is given a call of a made-up tool, and what it
writes around the tool's name and arguments is how the model was taught to call. Two kinds of form are known:
JSON (`{"name": ..., "arguments": {...}}` between whatever markers: Hermes, Qwen, Llama, Mistral, Granite) and
Python (`name(key="value")` between markers: MiniCPM, LFM2). A template with another form, or without tools,
is refused: calls that nobody can read would reach the user as text.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2

from .grammar import Grammar, with_blanks

NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_MOST = 8  # calls that are forced at a time: nothing else would end a list of them
# Words that stand nowhere else in a template; their spelling survives every quoting.
_TOOL, _KEY, _VALUE, _RESULT = "probe_tool_7f3a", "probe_key_7f3a", "probe_value_7f3a", "probe_result_7f3a"
_TEXT = "§text_7f3a"


@dataclass(frozen=True)
class Tool:
    """What a model may call.

    Attributes:
        name: letters, digits, `_` and `-`.
        description: for the model; it may be empty.
        parameters: JSON Schema of its arguments, an object.
        strict: arguments that do not fit the schema are impossible, not only unlikely.

    Raises:
        ValueError: a name of other characters.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"a tool's name is 1 to 128 letters, digits, underscores and hyphens, got {self.name[:140]!r}"
            )

    def as_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


@dataclass(frozen=True)
class ToolCall:
    """A call in a conversation: an id that its result names, the tool's name, and its arguments."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    def as_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        function = {"name": self.name, "arguments": dict(self.arguments)}
        return {"type": "function", "id": self.id, "function": function}


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call.

    Attributes:
        kind: `json` or `python`.
        before, after: what stands around a call: markers and blanks; either may be empty.
        pieces: of a JSON call, the text before the name, between it and the arguments, and behind them.
    """

    kind: Literal["json", "python"]
    before: str
    after: str
    pieces: tuple[str, str, str] = ("", "", "")

    @classmethod
    def of(cls, tokenizer: Any) -> "CallForm":
        """The form of a tokenizer's chat template.

        Raises:
            ValueError: no chat template; it does not show tools, calls or results; it writes calls in another
                form.
        """
        if not tokenizer.chat_template:
            raise ValueError("tools need a model with a chat template, and this one has none")
        try:
            called = _probe(tokenizer)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"tools cannot be had: this model's chat template refuses them: {error}"
            ) from error
        found = _json_form(called) or _python_form(called)
        if found is None:
            shown = " ".join(called.split())[:200]
            raise ValueError(
                f"tools cannot be had: this model's chat template writes calls in a form that is not "
                f"read: {shown}"
            )
        return found

    @property
    def marker(self) -> str:
        """What announces a call; empty if an answer is a call from its beginning or not at all."""
        return self.before.strip()

    def grammar(
        self, tools: Sequence[Tool], literal: Callable[[str], str], *, many: bool, free: bool = False
    ) -> Grammar:
        """Calls of these tools, with arguments of their schemas.

        Args:
            tools: one at least.
            literal: how a text is written in a grammar, see `Grammars.literal`.
            many: one call may follow another, 8 in all if they are forced.
            free: there may be other text, and calls may be left out; without it there is nothing but calls.

        Raises:
            ValueError: `free` calls of a form without a marker that announces them.
        """
        if free and not self.marker:
            raise ValueError(
                "strict tools with tool_choice 'auto' need a model that marks its calls: ask for 'required', "
                "or leave 'strict' out"
            )
        blanks = self.before[len(self.before.rstrip()) :]
        marker, rest = literal(self.marker), f"{literal(blanks)} tool {literal(self.after.rstrip())}"
        rules = ["%llguidance {}"]
        if not free:
            rules += [
                "start: call" + (f" (GAP call){{0,{_MOST - 1}}}" if many else ""),
                f"call: {marker} {rest}",
            ]
            rules += ["GAP: /[ \\n]?/"] if many else []
        elif marker.startswith("<["):  # a special token, which text never holds
            rules += [f"start: call{'*' if many else '?'} TEXT", f"call: TEXT {marker} {rest}"]
        else:
            rules += [f"start: call{'*' if many else '?'} TEXT", f"call: announced {rest}"]
            rules += [f"announced[lazy]: /(.|\\n)*/ {marker}"]
        rules += ["TEXT: /(.|\\n)*/"] if free else []
        rules.append("tool: " + " | ".join(f"tool_{number}" for number in range(len(tools))))
        for number, tool in enumerate(tools):
            made = self._json_rules if self.kind == "json" else _python_rules
            rules += made(f"tool_{number}", tool, literal)
        return Grammar("\n".join(rules))

    def _json_rules(self, name: str, tool: Tool, literal: Callable[[str], str]) -> list[str]:
        head, middle, tail = self.pieces
        schema = json.dumps(with_blanks({"type": "object", **tool.parameters}))
        return [f"{name}: {literal(head + tool.name + middle)} %json {schema} {literal(tail)}"]


def _python_rules(name: str, tool: Tool, literal: Callable[[str], str]) -> list[str]:
    """Rules of `name(key=value, ...)`: arguments in the schema's order, those that it requires always.

    `name_i` is what may stand from the i-th argument on if one stands before, `name_i_first` if none does.

    Raises:
        ValueError: a schema whose arguments have no names.
    """
    schema = {"type": "object", "properties": {}, **tool.parameters}
    keys, required = list(schema["properties"]), set(schema.get("required", []))
    odd = [key for key in keys if not key.isidentifier()]
    if odd or not required <= set(keys):
        raise ValueError(
            f"tool {tool.name!r} cannot be forced: this model calls in Python, so each argument must be in "
            f"'properties' and have the name of a variable, got {(odd or sorted(required - set(keys)))[0]!r}"
        )
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules = [f"{name}: {literal(tool.name + '(')} {name}_0_first {literal(')')}"]
    for number, key in enumerate(keys):
        value = schema["properties"][key]
        value = json.dumps(with_blanks({**shared, **value}) if isinstance(value, dict) else value)
        one, rest = f"{name}_{number}", f"{name}_{number + 1}"
        rules.append(f"{one}_value: {literal(key + '=')} %json {value}")
        must = key in required
        rules.append(f'{one}: "," " "? {one}_value {rest}' + ("" if must else f" | {rest}"))
        rules.append(f"{one}_first: {one}_value {rest}" + ("" if must else f" | {rest}_first"))
    return [*rules, f'{name}_{len(keys)}: ""', f'{name}_{len(keys)}_first: ""']


def _probe(tokenizer: Any) -> str:
    """What the template writes for an answer that is a call of the made-up tool, without the turn's end.

    Raises:
        ValueError: it leaves tools, calls or results out.
    """
    schema = {"type": "object", "properties": {_KEY: {"type": "string", "description": "A key."}}}
    tool = Tool(_TOOL, "A tool.", {**schema, "required": [_KEY]})
    call = ToolCall("call00001", _TOOL, {_KEY: _VALUE})  # Mistral's templates insist on nine characters

    def render(*turns: dict[str, Any]) -> str:
        talk = [{"role": "user", "content": "Hello"}, *turns]
        return tokenizer.apply_chat_template(talk, tools=[tool.as_template()], tokenize=False)

    if _TOOL not in render():
        raise ValueError("tools cannot be had: this model's chat template does not show them")
    turn = {"role": "assistant", "content": "", "tool_calls": [call.as_template()]}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": call.id, "name": _TOOL}
    said, called = render({"role": "assistant", "content": _TEXT}), render(turn)
    if _VALUE not in called or _RESULT not in render(turn, result):
        what = "calls" if _VALUE not in called else "their results"
        raise ValueError(
            f"tools cannot be had: this model's chat template leaves {what} out of a conversation"
        )
    begin = len(os.path.commonprefix([said, called]))
    end = said[said.rfind(_TEXT) + len(_TEXT) :]
    return called[begin:].removesuffix(end)


def _json_form(called: str) -> CallForm | None:
    name = called.find(_TOOL)
    start = called.rfind("{", 0, name)
    try:
        found, end = json.JSONDecoder().raw_decode(called, max(0, start))
    except ValueError:
        return None
    key = (
        next((k for k, v in found.items() if v == {_KEY: _VALUE}), None) if isinstance(found, dict) else None
    )
    if key is None or found.get("name") != _TOOL:
        return None
    opening = re.compile(rf'"{re.escape(key)}"\s*:\s*').search(called, name)
    if opening is None:  # the arguments come before the name
        return None
    _, arguments_end = json.JSONDecoder().raw_decode(called, opening.end())
    pieces = called[start:name], called[name + len(_TOOL) : opening.end()], called[arguments_end:end]
    return CallForm("json", called[:start], called[end:], pieces)


def _python_form(called: str) -> CallForm | None:
    found = re.search(rf"{_TOOL}\(\s*{_KEY}\s*=\s*(['\"]){_VALUE}\1\s*\)", called)
    if found is None or not called[: found.start()].strip():
        return None  # without a marker any text could be one
    return CallForm("python", called[: found.start()], called[found.end() :])
