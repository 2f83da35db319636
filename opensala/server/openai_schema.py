"""Requests of OpenAI's API: chat completions, completions, responses."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from ..engine.chat import Message
from .errors import bad_request
from .schema import (
    ApiRequest,
    ContextId,
    Count,
    Parts,
    Penalty,
    Probability,
    Seed,
    Stops,
    Strict,
    TokenIds,
    TopK,
    texts,
)

_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
    }
)
MAX_CHOICES = 16


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingRequest(ApiRequest):
    """How to sample: OpenAI's fields, and those that other servers add to them."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[Stops, Field(max_length=4)] = []
    seed: Seed | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    max_tokens: Count | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: TopK = 0
    min_p: Probability = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    context: ContextId | None = None

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise bad_request(
                "Invalid 'stream_options': only allowed with stream=true", "stream_options", "invalid_value"
            )


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Parts | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_call_id: str | None = None

    def as_message(self, place: str) -> Message:
        if self.role in ("tool", "function"):
            raise bad_request(
                f"Invalid '{place}.role': tools are not implemented by this server, got {self.role!r}",
                f"{place}.role",
                "invalid_value",
            )
        if self.content is None and self.role != "assistant":
            raise bad_request(
                f"Missing required parameter: '{place}.content'",
                f"{place}.content",
                "missing_required_parameter",
            )
        role = "system" if self.role == "developer" else self.role
        return Message(role, texts(self.content or [], place))


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    ignored: ClassVar = _WITHOUT_EFFECT | {"reasoning_effort", "verbosity", "prediction"}
    unsupported: ClassVar = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    selection: Annotated[
        bool, Field(description="Keep which blocks were selected, for GET /v1/selections/{id}.")
    ] = False

    def conversation(self) -> list[Message]:
        return [m.as_message(f"messages[{n}]") for n, m in enumerate(self.messages)]


def _as_prompts(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        return [value]
    return value


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
Prompts = Annotated[
    list[str | list[Annotated[int, Field(ge=0, lt=1 << 31)]]],
    BeforeValidator(_as_prompts),
    Field(min_length=1, max_length=64),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                _IDS,
                {"type": "array", "items": _IDS},
            ]
        }
    ),
]


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    ignored: ClassVar = _WITHOUT_EFFECT
    unsupported: ClassVar = {"suffix": ("",), "logit_bias": ({},), "best_of": (1,)}

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


class InputItem(Strict):
    """A message of a response's input. What else an item may be (calls of tools, references) is refused by
    its type."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Parts | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def as_message(self, place: str) -> Message:
        if self.role is None or self.content is None:
            name = "role" if self.role is None else "content"
            raise bad_request(
                f"Missing required parameter: '{place}.{name}'",
                f"{place}.{name}",
                "missing_required_parameter",
            )
        role = "system" if self.role == "developer" else self.role
        return Message(role, texts(self.content, place))


def _as_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    for number, item in enumerate(value) if isinstance(value, list) else ():
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind != "message":
            raise bad_request(
                f"Invalid 'input[{number}].type': this server takes messages only, got {kind[:60]!r}",
                f"input[{number}].type",
                "invalid_value",
            )
    return value


Items = Annotated[
    list[InputItem],
    BeforeValidator(_as_items),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class ResponsesRequest(ApiRequest):
    """POST /v1/responses. Nothing is stored."""

    ignored: ClassVar = (_WITHOUT_EFFECT - {"metadata"}) | {
        "reasoning",
        "max_tool_calls",
        "truncation",
        "context_management",
        "access_programs",
        "stream_options",
    }
    unsupported: ClassVar = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "text": ({"format": {"type": "text"}}, {}),
        "background": (False,),
        "background_options": (),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "image": (),
        "moderation": (),
    }

    model: str
    input: Items
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    include: list[str] = []
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}
    stream: bool = False
    context: ContextId | None = None

    def conversation(self) -> list[Message]:
        first = [Message("system", (self.instructions,))] if self.instructions else []
        return first + [item.as_message(f"input[{n}]") for n, item in enumerate(self.input)]
