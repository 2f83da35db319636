"""The application: the routes of all APIs, their errors, and their description."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import basics, contexts, selections
from .anthropic_schema import CountRequest, MessagesRequest
from .chat import chat_completions
from .completions import completions
from .errors import ApiError
from .guard import Guard
from .http import api_of
from .messages import count_tokens, messages
from .openai_schema import ChatRequest, CompletionRequest, ResponsesRequest
from .page import add_page
from .responses import responses
from .schema import ApiRequest
from .service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]
_POSTS: tuple[tuple[str, Handler, type[ApiRequest]], ...] = (
    ("/v1/chat/completions", chat_completions, ChatRequest),
    ("/v1/completions", completions, CompletionRequest),
    ("/v1/responses", responses, ResponsesRequest),
    ("/v1/messages", messages, MessagesRequest),
    ("/v1/messages/count_tokens", count_tokens, CountRequest),
    ("/tokenize", basics.tokenize, basics.TokenizeRequest),
)


def create_app(service: Service, hosts: frozenset[str] | None = None) -> FastAPI:
    """An ASGI application that serves a model.

    Args:
        service: started and closed with the application.
        hosts: see `Guard`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="OpenSALA",
        lifespan=lifespan,
        docs_url=None,  # these load their scripts from elsewhere
        redoc_url=None,
        telemetry={"auto_configure": False},  # nothing is exported, whatever the environment says
    )
    app.state.service = service
    for path, handler, schema in _POSTS:
        app.add_api_route(
            path,
            _route(service, handler),
            methods=["POST"],
            name=handler.__name__,
            openapi_extra=_body(schema, service.name),
            responses=_REFUSALS,
        )
    _add_contexts(app, service)
    _add_gets(app, service)
    add_page(app)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Guard, service=service, hosts=hosts)
    return app


def _route(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        return await handler(service, request)

    return route


_CONTEXTS: tuple[tuple[str, str, Handler, type[ApiRequest] | None], ...] = (
    ("POST", "/v1/contexts", contexts.create_context, contexts.CreateRequest),
    ("GET", "/v1/contexts", contexts.list_contexts, None),
    ("GET", "/v1/contexts/{id}", contexts.get_context, None),
    ("PATCH", "/v1/contexts/{id}", contexts.change_context, contexts.ChangeRequest),
    ("DELETE", "/v1/contexts/{id}", contexts.delete_context, None),
    ("POST", "/v1/contexts/{id}/extend", contexts.extend_context, contexts.ExtendRequest),
    ("POST", "/v1/contexts/{id}/fork", contexts.fork_context, contexts.ForkRequest),
    ("GET", "/v1/contexts/{id}/text", selections.get_text, None),
    ("GET", "/v1/contexts/{id}/documents", selections.get_documents, None),
    ("GET", "/v1/selections/{id}", selections.get_selection, None),
)


def _add_contexts(app: FastAPI, service: Service) -> None:
    place = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    for method, path, handler, schema in _CONTEXTS:
        described = {} if schema is None else _body(schema, service.name)
        app.add_api_route(
            path,
            _route(service, handler),
            methods=[method],
            name=handler.__name__,
            openapi_extra=described
            | ({"parameters": [place, *selections.QUERIES.get(path, [])]} if "{id}" in path else {}),
            responses=_REFUSALS,
        )


def _add_gets(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=_REFUSALS)
    def models() -> dict[str, Any]:
        return basics.models(service)

    @app.get("/v1/models/{name:path}", responses=_REFUSALS)
    def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return basics.model(service)

    @app.get("/v1/server", responses=_REFUSALS)
    async def server() -> dict[str, Any]:
        return basics.server(service)

    @app.get("/health", responses=_REFUSALS)
    async def health() -> Response:
        return basics.health(service)

    @app.get("/metrics", responses=_REFUSALS)
    async def metrics() -> Response:
        return basics.metrics(service)


_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in (
        (400, "The request is wrong; the error names the field."),
        (401, "No API key, or a wrong one."),
        (404, "No such model or path."),
        (413, "The body is too large."),
        (415, "The body is not application/json."),
        (429, "A limit is reached; Retry-After says when to try again."),
        (503, "The server is shutting down."),
    )
}


def _body(schema: type[ApiRequest], model: str) -> dict[str, Any]:
    described = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    if "model" in described["properties"]:
        described["properties"]["model"] = {"type": "string", "enum": [model]}
    content = {"application/json": {"schema": _inline(described, described.pop("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references: requests are small trees."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(value, definitions) for name, value in node.items()}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "it is registered for these"
    body = error.body(api_of(request.scope), request.scope["request_id"])
    return JSONResponse(body, error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "it is registered for these"
    text = {404: "no such path", 405: "this path does not have this method"}.get(
        error.status_code, error.detail
    )
    where = f"{request.method} {request.url.path}"[:200]
    return await _on_api_error(request, ApiError(error.status_code, f"{text}: {where}", code="not_found"))
