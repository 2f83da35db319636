"""Requests of Anthropic's API: messages, and counting their tokens."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ..engine import Grammar
from ..engine.chat import Message
from ..engine.tools import ToolCall
from .errors import bad_request
from .schema import ApiRequest, ContextId, Count, Parts, Probability, StopText, Strict, TextPart, texts
from .tools import MAX_TOOLS, AnthropicTool, ToolChoice, ToolUse, anthropic_use


class DocumentSource(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    data: str = ""
    media_type: str = "text/plain"


class Block(TextPart):
    """A content block: text, or a document that is text."""

    source: DocumentSource | None = None
    title: str | None = None
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: Parts = []
    is_error: bool = False

    def as_text(self, place: str) -> str:
        if self.type != "document":
            return texts([self], place)[0]
        if self.source is None or self.source.type != "text":
            raise bad_request("Only documents whose source is text are read", f"{place}.source.type")
        return f"{self.title}\n\n{self.source.data}" if self.title else self.source.data


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Blocks = Annotated[
    list[Block],
    BeforeValidator(_as_blocks),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: Blocks

    def as_messages(self, place: str) -> Iterator[Message]:
        """Results of calls come before what the user says beside them.

        Raises:
            ApiError: 400, a call without its fields, or where none can be.
        """
        said: list[str] = []
        calls: list[ToolCall] = []
        for number, block in enumerate(self.content):
            where = f"{place}.content[{number}]"
            if block.type not in ("tool_use", "tool_result"):
                said.append(block.as_text(where))
            elif self.role != ("assistant" if block.type == "tool_use" else "user"):
                raise bad_request(
                    f"Invalid '{where}': no {block.type} can be in a turn of the {self.role}", where
                )
            elif block.type == "tool_use":
                if not block.id or not block.name or block.input is None:
                    raise bad_request(f"Missing in '{where}': a tool_use has 'id', 'name' and 'input'", where)
                calls.append(ToolCall(block.id, block.name, block.input))
            else:
                error = ("Error:",) if block.is_error else ()  # templates have no other way to say it
                yield Message("tool", error + texts(block.content, where), call_id=block.tool_use_id)
        if said or calls or not self.content:
            yield Message(self.role, tuple(said), tuple(calls))


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(ApiRequest):
    """POST /v1/messages/count_tokens."""

    ignored: ClassVar = frozenset({"cache_control", "speed", "user_profile_id", "workspace_id"})
    unsupported: ClassVar = {
        "thinking": ({"type": "disabled"},),
        "mcp_servers": ([],),
        "container": (),
        "context_management": ({},),
    }

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Parts = []
    context: ContextId | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig = OutputConfig()

    def conversation(self) -> list[Message]:
        system = texts(self.system, "system")
        first = [Message("system", system)] if any(system) else []
        return first + [m for n, turn in enumerate(self.messages) for m in turn.as_messages(f"messages[{n}]")]

    def tool_use(self) -> ToolUse:
        """The tools of the answer; raises ApiError where they contradict each other."""
        return anthropic_use([tool.as_tool() for tool in self.tools], self.tool_choice)

    def grammar(self) -> Grammar | None:
        given = self.output_config.format
        return None if given is None else Grammar.json_schema(given.schema_)


def _not_blank(text: str) -> str:
    """As the official API has it."""
    if not text.strip():
        raise ValueError("each stop sequence must contain non-whitespace")
    return text


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    ignored: ClassVar = CountRequest.ignored | {"metadata", "service_tier", "inference_geo", "diagnostics"}

    max_tokens: Count
    stop_sequences: Annotated[
        list[Annotated[StopText, AfterValidator(_not_blank)]], Field(max_length=64)
    ] = []
    stream: bool = False
    temperature: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    top_p: Probability | None = None
