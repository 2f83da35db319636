"""Tools and forms of answers as requests have them, and what they mean for the engine."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from ..engine import Grammar
from ..engine.tools import CallForm, Tool, ToolCall
from .errors import ApiError, bad_request
from .schema import Strict

MAX_TOOLS = 128
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
Schema = dict[str, Any]
_EMPTY: Schema = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolUse:
    """What of tools an answer may have.

    Attributes:
        tools: that are offered.
        choice: whether calls are forbidden, left to the model, or all that an answer may be.
        parallel: more than one call may be made.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    parallel: bool = True

    def only(self, name: str, param: str) -> "ToolUse":
        """The same, with a call of this tool as all that an answer may be.

        Raises:
            ApiError: 400, it is not offered.
        """
        found = tuple(tool for tool in self.tools if tool.name == name)
        if not found:
            offered = ", ".join(tool.name for tool in self.tools) or "none"
            raise bad_request(
                f"Invalid '{param}': no tool {name[:100]!r} in 'tools' ({offered[:300]})",
                param,
                "invalid_value",
            )
        return ToolUse(found, "required", self.parallel)


def tool_use(tools: Sequence[Tool], choice: str, parallel: bool) -> ToolUse:
    """Tools with a choice that names none of them.

    Raises:
        ApiError: 400, two tools of a name; a call is required and there are no tools.
    """
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise bad_request(f"Invalid 'tools': two tools are named {twice!r}", "tools", "invalid_value")
    if choice == "required" and not tools:
        raise bad_request("Invalid 'tool_choice': a call is required, and 'tools' has none", "tool_choice")
    return ToolUse(() if choice == "none" else tuple(tools), choice, parallel)  # type: ignore[arg-type]


class Shape:
    """What an answer may look like, for the engine and for who reads it.

    Args:
        use: tools.
        form: how the model writes calls; needed if there are tools.
        grammar: the form of an answer, tools apart.
        literal: see `CallForm.grammar`.
        special: texts of the tokenizer's special tokens.

    Attributes:
        stop: texts at which an answer ends, beside those that were asked for.
        keep_special: whether the markers of calls are special tokens, which texts leave out.

    Raises:
        ValueError: tools that cannot be forced.
    """

    def __init__(
        self,
        use: ToolUse,
        form: CallForm | None,
        grammar: Grammar | None,
        literal: Callable[[str], str],
        special: Sequence[str],
    ) -> None:
        self.use, self.form, self.grammar = use, form, grammar
        self.stop: tuple[str, ...] = ()
        self.keep_special = False
        if form is None:
            return
        self.keep_special = any(token in form.before + form.after for token in special)
        strict = any(tool.strict for tool in use.tools)
        if use.choice == "required" or strict:
            free = use.choice == "auto"
            self.grammar = form.grammar(use.tools, literal, many=use.parallel, free=free)
        elif not use.parallel and form.after.strip():
            self.stop = (form.after.strip(),)  # a second call is nobody's


class FormatSchema(Strict):
    """The schema of an answer, as chat completions have it."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = {"type": "object"}
    strict: bool | None = None


class ResponseFormat(Strict):
    """`response_format` of chat completions."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: FormatSchema | None = None

    def grammar(self) -> Grammar | None:
        """Enforced whether it says `strict` or not.

        Raises:
            ApiError: 400, a schema is announced and missing.
        """
        given = None if self.json_schema is None else self.json_schema.schema_
        return format_grammar(self.type, given, "response_format.json_schema")


class TextFormat(Strict):
    """`text.format` of responses."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat = TextFormat()
    verbosity: Literal["low", "medium", "high"] | None = None

    def grammar(self) -> Grammar | None:
        """See `ResponseFormat.grammar`."""
        return format_grammar(self.format.type, self.format.schema_, "text.format.schema")


def format_grammar(kind: str, schema: Schema | None, place: str) -> Grammar | None:
    """The grammar of a kind of answer: text, any JSON object, or what a schema says.

    Raises:
        ApiError: 400, a schema is announced and missing.
    """
    if kind == "json_schema":
        if schema is None:
            raise bad_request(f"Missing required parameter: '{place}'", place, "missing_required_parameter")
        return Grammar.json_schema(schema)
    return Grammar.json_object() if kind == "json_object" else None


class FunctionDefinition(Strict):
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    def as_tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters or _EMPTY, bool(self.strict))


class ChatTool(Strict):
    """A tool of chat completions."""

    type: Literal["function"]
    function: FunctionDefinition


class ResponsesTool(FunctionDefinition):
    """A tool of responses."""

    type: Literal["function"]


class AnthropicTool(Strict):
    """A tool of messages. Where its caching and streaming are concerned, it changes nothing here."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Schema
    strict: bool | None = None

    def as_tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.input_schema, bool(self.strict))


class ToolChoice(Strict):
    """A choice that is an object: OpenAI's names a function, Anthropic's may name a tool."""

    type: str
    name: str | None = None
    function: dict[Literal["name"], str] | None = None
    disable_parallel_tool_use: bool = False


def _as_choice(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Choice = Annotated[
    ToolChoice,
    BeforeValidator(_as_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}),
]


def openai_use(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool) -> ToolUse:
    """From OpenAI's fields.

    Raises:
        ApiError: 400, see `tool_use`; a choice that this server does not have.
    """
    kind = "auto" if choice is None else choice.type
    if kind in ("none", "auto", "required"):
        return tool_use(tools, kind, parallel)
    assert choice is not None, "its type was looked at"
    name = choice.name or (choice.function or {}).get("name")
    if kind != "function" or name is None:
        raise _no_choice(kind, "'none', 'auto', 'required' or a function by its name")
    return tool_use(tools, "auto", parallel).only(name, "tool_choice")


def anthropic_use(tools: Sequence[Tool], choice: ToolChoice | None) -> ToolUse:
    """From Anthropic's fields.

    Raises:
        ApiError: 400, see `openai_use`.
    """
    kind, parallel = ("auto", True) if choice is None else (choice.type, not choice.disable_parallel_tool_use)
    if kind in ("auto", "any", "none"):
        return tool_use(tools, {"any": "required"}.get(kind, kind), parallel)
    assert choice is not None, "its type was looked at"
    if kind != "tool" or choice.name is None:
        raise _no_choice(kind, "'auto', 'any', 'none' or a tool by its name")
    return tool_use(tools, "auto", parallel).only(choice.name, "tool_choice")


def _no_choice(kind: str, allowed: str) -> ApiError:
    return bad_request(
        f"Invalid 'tool_choice': must be {allowed}, got {kind[:60]!r}", "tool_choice", "invalid_value"
    )


def parse_call(call_id: str, name: str, arguments: str, place: str) -> ToolCall:
    """A call of an earlier answer, whose arguments come as JSON in a string.

    Raises:
        ApiError: 400, they are no JSON object.
    """
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise bad_request(f"Invalid '{place}': must be a JSON object in a string", place, "invalid_value")
    return ToolCall(call_id, name, found)
