"""Requests of Anthropic's API: messages, and counting their tokens."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ..engine.chat import Message
from .errors import bad_request
from .schema import ApiRequest, ContextId, Count, Parts, Probability, StopText, Strict, TextPart, texts


class DocumentSource(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    data: str = ""
    media_type: str = "text/plain"


class Block(TextPart):
    """A content block: text, or a document that is text."""

    source: DocumentSource | None = None
    title: str | None = None

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


class CountRequest(ApiRequest):
    """POST /v1/messages/count_tokens."""

    ignored: ClassVar = frozenset({"cache_control", "speed", "user_profile_id", "workspace_id"})
    unsupported: ClassVar = {
        "tools": ([],),
        "tool_choice": ({"type": "none"}, {"type": "auto"}),
        "thinking": ({"type": "disabled"},),
        "output_config": ({},),
        "mcp_servers": ([],),
        "container": (),
        "context_management": ({},),
    }

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Parts = []
    context: ContextId | None = None

    def conversation(self) -> list[Message]:
        system = texts(self.system, "system")
        first = [Message("system", system)] if any(system) else []
        return first + [
            Message(
                turn.role, tuple(b.as_text(f"messages[{n}].content[{i}]") for i, b in enumerate(turn.content))
            )
            for n, turn in enumerate(self.messages)
        ]


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    ignored: ClassVar = CountRequest.ignored | {"metadata", "service_tier", "inference_geo", "diagnostics"}

    max_tokens: Count
    stop_sequences: Annotated[list[StopText], Field(max_length=64)] = []
    stream: bool = False
    temperature: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    top_p: Probability | None = None
