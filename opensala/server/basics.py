"""Routes that generate nothing: models, tokens of a text, health, metrics."""

from datetime import UTC, datetime
from typing import Annotated, ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine.memory import resident_bytes
from .errors import ApiError, bad_request
from .http import read_json
from .openai_schema import ChatMessage
from .schema import ApiRequest
from .service import Service


class TokenizeRequest(ApiRequest):
    """POST /tokenize: `prompt`, a text as it is, or `messages`, a conversation."""

    ignored: ClassVar = frozenset({"add_special_tokens"})

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None


def models(service: Service) -> dict[str, object]:
    """The models, in the shape of both APIs."""
    return {
        "object": "list",
        "data": [model(service)],
        "has_more": False,
        "first_id": service.name,
        "last_id": service.name,
    }


def model(service: Service) -> dict[str, object]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "opensala",
        "type": "model",
        "display_name": service.name,
        "created_at": _iso(service.created),
        "max_model_len": service.context,
    }


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def tokenize(service: Service, request: Request) -> Response:
    asked = TokenizeRequest.parse(await read_json(request, service.options))
    if asked.model is not None:
        service.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise bad_request("Give either 'prompt' or 'messages'", "prompt")
    if asked.messages is not None:
        prompt = await service.chat([m.as_message(f"messages[{n}]") for n, m in enumerate(asked.messages)])
    else:
        prompt = await service.raw(asked.prompt or "")
    return JSONResponse({"count": len(prompt.ids), "max_model_len": service.context, "tokens": prompt.ids})


def server(service: Service) -> dict[str, object]:
    """What a page that shows the server needs to know: what it serves, its limits, its memory in bytes."""
    engine, stats = service.engine, service.loop.stats
    used = stats.pages - stats.pages_free
    return {
        "object": "server",
        "model": service.name,
        "max_model_len": service.context,
        "dense_len": engine.config.attention_rule.dense_len,
        "contexts": service.keeper is not None,
        "max_body_bytes": service.options.max_body_bytes,
        "memory": {
            "process_bytes": resident_bytes(engine.device),
            "cache_bytes": stats.pages * engine.sizes.page,
            "cache_used_bytes": used * engine.sizes.page,
        },
    }


def health(service: Service) -> Response:
    if not service.loop.is_alive:
        raise ApiError(
            503, "the engine is not running, or is being stopped", code="unavailable", retry_after=5
        )
    return JSONResponse({"status": "ok"})


def metrics(service: Service) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
