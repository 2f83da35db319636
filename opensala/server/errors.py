"""What goes wrong, in the shape of the API that was called.

OpenAI's: `{"error": {"message", "type", "param", "code"}}`. Anthropic's: `{"type": "error", "error": {"type",
"message"}, "request_id"}`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

Api = Literal["openai", "anthropic"]

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refusal or a failure that the caller is told.

    Attributes:
        status: of HTTP.
        message: one sentence that names the field, what it was and what is allowed.
        param: the field of the request, if it is about one.
        code: OpenAI's word for it.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self, api: Api, request_id: str) -> dict[str, Any]:
        """The error as the API that was called shapes it."""
        if api == "anthropic":
            kind = _ANTHROPIC_TYPES.get(
                self.status, "api_error" if self.status > 499 else "invalid_request_error"
            )
            message = self.message
            if self.param and not message.startswith(self.param):
                message = f"{self.param}: {message}"
            return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
        kind = _OPENAI_TYPES.get(
            self.status, "server_error" if self.status > 499 else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def shutting_down(why: str = "the server is shutting down") -> ApiError:
    return ApiError(503, why, code="unavailable", retry_after=5)


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than {seconds:g} s", code="timeout")


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request, by the name of its field; that it is of another type than
    any that is read goes before what this type lacks."""
    errors = error.errors(include_url=False)
    first = next(
        (e for e in errors if e["type"] == "literal_error" and e["loc"][-1:] == ("type",)), errors[0]
    )
    place = _own(first["loc"])
    param = _place(place)
    if first["type"] == "extra_forbidden":
        return bad_request(
            f"Unknown parameter: '{param}': extra inputs are not permitted", param, "unknown_parameter"
        )
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: '{param}'", param, "missing_required_parameter")
    says = [first["msg"]]
    if len(place) < len(first["loc"]):  # it fits none of several
        says = [e["msg"] for e in errors if e["loc"][: len(place)] == place]
    text = " or ".join(dict.fromkeys(map(_lower, says)))
    got = "" if isinstance(first.get("input"), (Mapping, list)) else f", got {_short(first.get('input'))}"
    return bad_request(f"Invalid '{param}': {text}{got}", param, "invalid_value")


def _own(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place without what pydantic adds for one of several types (`str`, `list[int]`) and what is in it."""
    for number, part in enumerate(location):
        if isinstance(part, str) and (part == "str" or part.startswith("list[")):
            return location[:number]
    return location


def from_value_error(error: ValueError, fields: Mapping[str, str]) -> ApiError:
    """A refusal of the engine; `fields` are the request's names for those that its message begins with."""
    message = str(error)
    name = message.split(" ", 1)[0]
    if name in fields:
        return bad_request(message.replace(name, fields[name], 1), fields[name], "invalid_value")
    return bad_request(message)


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a very large number"
    return text if len(text) <= 60 else text[:57] + "..."


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
