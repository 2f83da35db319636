"""What all requests have in common: how they are parsed, and fields that several of them have.

A field that the official API has and that changes nothing here is ignored; one that would change the answer
and is not implemented is refused; a name that the official API does not know is refused, as it does.
"""

import re
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from .errors import bad_request, from_validation

_SURROGATES = re.compile("[\ud800-\udfff]")
_DEEPEST = 64  # lists and objects within one another

R = TypeVar("R", bound="ApiRequest")


class Strict(BaseModel):
    """No guesses: "1" is not a number and 1.5 not a whole one, and unknown names are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ApiRequest(Strict):
    """A request's body.

    `ignored` are fields of the official API that change nothing here. `unsupported` are those that would:
    they are refused unless they have one of the values listed, which ask for nothing.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def parse(cls: type[R], data: Any) -> R:
        """The request, from parsed JSON.

        Raises:
            ApiError: 400, naming the first field that is wrong.
        """
        if not isinstance(data, dict):
            raise bad_request("The request's body must be a JSON object")
        check_json(data)
        given = {name: value for name, value in data.items() if value is not None}  # null means left out
        for name, harmless in cls.unsupported.items():
            if name in given and given.pop(name) not in harmless:
                raise bad_request(
                    f"Unsupported parameter: '{name}' is not implemented by this server",
                    name,
                    "unsupported_parameter",
                )
        for name in cls.ignored & given.keys():
            del given[name]
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise from_validation(error) from None


def check_json(data: Any) -> None:
    """Refuse what no tokenizer can take: halves of surrogate pairs; and nesting beyond all use.

    Raises:
        ApiError: 400, naming where.
    """
    stack: list[tuple[str, int, Any]] = [("", 0, data)]
    while stack:
        place, depth, value = stack.pop()
        if depth > _DEEPEST:
            raise bad_request(f"The body is nested more than {_DEEPEST} levels deep")
        if isinstance(value, str) and _SURROGATES.search(value):
            raise bad_request(
                f"Invalid '{place}': not valid Unicode (half of a surrogate pair)", place, "invalid_value"
            )
        if isinstance(value, dict):
            if any(_SURROGATES.search(name) for name in value):
                raise bad_request("The body has a name that is not valid Unicode (half of a surrogate pair)")
            stack += [(f"{place}.{k}" if place else k, depth + 1, v) for k, v in value.items()]
        elif isinstance(value, list):
            stack += [(f"{place}[{n}]", depth + 1, v) for n, v in enumerate(value)]


class TextPart(BaseModel):
    """A part of a message: text, by whatever name the API has for it. Other fields of it (cache control,
    annotations) change nothing."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str = ""
    refusal: str = ""


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_PART = {
    "type": "object",
    "properties": {"type": {"type": "string"}, "text": {"type": "string"}},
    "required": ["type"],
}
Parts = Annotated[
    list[TextPart],
    BeforeValidator(_as_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def texts(parts: list[TextPart], place: str) -> tuple[str, ...]:
    """The texts of a message's parts.

    Raises:
        ApiError: 400 for an image, a file or anything else that is not text.
    """
    for number, part in enumerate(parts):
        if part.type not in TEXT_PARTS and part.type != "refusal":
            raise bad_request(
                f"Invalid '{place}.content[{number}].type': only text is read, got {part.type[:60]!r}",
                f"{place}.content[{number}].type",
                "invalid_value",
            )
    return tuple(part.text if part.type in TEXT_PARTS else part.refusal for part in parts)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[
    list[StopText],
    BeforeValidator(_as_list),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]}
    ),
]
ContextId = Annotated[
    str, Field(max_length=200, description="A context of POST /v1/contexts that the conversation is about.")
]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
TopK = Annotated[int, Field(ge=-1, lt=1 << 31, description="Sample from so many tokens; 0 or -1 for all.")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=64)]
