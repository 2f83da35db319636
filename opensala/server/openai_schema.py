"""Requests of OpenAI's API: chat completions, completions, responses."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from ..engine import Grammar
from ..engine.chat import Message
from .errors import ApiError, bad_request
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
from .tools import (
    MAX_TOOLS,
    ChatTool,
    Choice,
    ResponseFormat,
    ResponsesTool,
    TextOptions,
    ToolUse,
    openai_use,
    parse_call,
)

_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
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


class FunctionMade(Strict):
    name: str
    arguments: str


class CallMade(Strict):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionMade


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Parts | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[CallMade], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    def as_message(self, place: str) -> Message:
        if self.role == "tool" and self.tool_call_id is None:
            raise _missing(f"{place}.tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise bad_request(
                f"Invalid '{place}.tool_calls': only the assistant calls tools", f"{place}.tool_calls"
            )
        calls = tuple(
            parse_call(
                c.id, c.function.name, c.function.arguments, f"{place}.tool_calls[{n}].function.arguments"
            )
            for n, c in enumerate(self.tool_calls or ())
        )
        if self.content is None and self.role != "assistant":
            raise _missing(f"{place}.content")
        role = "system" if self.role == "developer" else self.role
        return Message(role, texts(self.content or [], place), calls, self.tool_call_id or "")


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    ignored: ClassVar = _WITHOUT_EFFECT | {"reasoning_effort", "verbosity", "prediction"}
    unsupported: ClassVar = {
        "functions": ([],),
        "function_call": ("none", "auto"),
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
    tools: Annotated[list[ChatTool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None

    def conversation(self) -> list[Message]:
        return [m.as_message(f"messages[{n}]") for n, m in enumerate(self.messages)]

    def tool_use(self) -> ToolUse:
        """The tools of the answer; raises ApiError where they contradict each other."""
        tools = [tool.function.as_tool() for tool in self.tools]
        return openai_use(tools, self.tool_choice, self.parallel_tool_calls)

    def grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()


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
    """A part of a response's input: a message, a call of a tool, or its result. What else an item may be
    (references, reasoning) is refused by its type."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Parts | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Parts | None = None

    def as_message(self, place: str) -> Message:
        """Raises ApiError if it lacks what its type needs."""
        for name in _NEEDED[self.type]:
            if getattr(self, name) is None:
                raise _missing(f"{place}.{name}")
        if self.type == "function_call":
            call = parse_call(self.call_id or "", self.name or "", self.arguments or "", f"{place}.arguments")
            return Message("assistant", (), (call,))
        if self.type == "function_call_output":
            return Message("tool", texts(self.output or [], place), call_id=self.call_id or "")
        assert self.role is not None, "it is needed"
        role = "system" if self.role == "developer" else self.role
        return Message(role, texts(self.content or [], place))


_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


def _missing(place: str) -> ApiError:
    return bad_request(f"Missing required parameter: '{place}'", place, "missing_required_parameter")


def _as_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    for number, item in enumerate(value) if isinstance(value, list) else ():
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind not in _NEEDED:
            raise bad_request(
                f"Invalid 'input[{number}].type': must be one of {', '.join(_NEEDED)}, got {kind[:60]!r}",
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
        "context_management",
        "access_programs",
        "stream_options",
    }
    unsupported: ClassVar = {
        "background": (False,),
        "truncation": ("disabled", "auto"),  # what is too long is refused in either case
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
    text: TextOptions = TextOptions()
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True

    def conversation(self) -> list[Message]:
        """Calls belong to the assistant's message before them, as templates write them."""
        made = [Message("system", (self.instructions,))] if self.instructions else []
        for number, item in enumerate(self.input):
            message = item.as_message(f"input[{number}]")
            if message.calls and made and made[-1].role == "assistant":
                made[-1] = replace(made[-1], calls=(*made[-1].calls, *message.calls))
            else:
                made.append(message)
        return made

    def tool_use(self) -> ToolUse:
        """See `ChatRequest.tool_use`."""
        return openai_use([tool.as_tool() for tool in self.tools], self.tool_choice, self.parallel_tool_calls)

    @property
    def tools_as_given(self) -> list[dict[str, Any]]:
        """As a response repeats them, with what its description wants to be there."""
        return [tool.model_dump() for tool in self.tools]

    @property
    def choice_as_given(self) -> Any:
        choice = self.tool_choice
        if choice is None:
            return "auto"
        return {"type": choice.type, "name": choice.name} if choice.name is not None else choice.type
