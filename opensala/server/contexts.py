"""/v1/contexts: documents that are uploaded and read once, then named by an id in any request."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..contexts.kept import Kept
from ..contexts.shelf import Record
from ..engine import Document
from ..engine.documents import shown
from .chat import DONE, openai_error
from .errors import bad_request
from .http import EventStream, event, read_json, while_connected
from .keeping import Keeper, Progress, Wish
from .schema import ApiRequest, Strict
from .service import Service

_LONGEST_TTL = 10 * 365 * 86_400  # seconds
Ttl = Annotated[int, Field(ge=1, le=_LONGEST_TTL, description="Seconds that it is kept from now on.")]


class DocumentPart(Strict):
    """A document: its name stands above its text where there are several."""

    name: Annotated[str, Field(min_length=1, max_length=500)] = "document"
    text: Annotated[str, Field(min_length=1)]


class ForkRequest(ApiRequest):
    """POST /v1/contexts/{id}/fork."""

    ttl: Ttl | None = None
    pinned: bool = False


class ExtendRequest(ForkRequest):
    """POST /v1/contexts/{id}/extend."""

    documents: Annotated[list[DocumentPart], Field(min_length=1, max_length=10_000)]
    stream: bool = False

    def read(self) -> list[Document]:
        """The documents as the command line would read them from files.

        Raises:
            ApiError: 400, one without text.
        """
        for number, document in enumerate(self.documents):
            if not document.text.strip() or "\0" in document.text:
                what = (
                    "it has no text"
                    if not document.text.strip()
                    else "it holds zero bytes, which no text has"
                )
                place = f"documents[{number}].text"
                raise bad_request(f"Invalid '{place}': {what}", place, "invalid_value")
        return [Document(shown(d.name), d.text.replace("\r\n", "\n")) for d in self.documents]


class CreateRequest(ExtendRequest):
    """POST /v1/contexts."""

    model: str


class ChangeRequest(ApiRequest):
    """PATCH /v1/contexts/{id}: what is named changes; a ttl counts from now on."""

    ttl: Ttl | None = None
    pinned: bool | None = None


def shape(record: Record) -> dict[str, Any]:
    """A context as clients see it."""
    return {
        "id": record.id,
        "object": "context",
        "created_at": record.created,
        "model": record.model,
        "tokens": record.tokens,
        "bytes": record.bytes,
        "documents": record.documents,
        "parent": record.parent,
        "ttl": record.ttl,
        "pinned": record.pinned,
        "expires_at": record.expires,
    }


async def create_context(service: Service, request: Request) -> Response:
    keeper = service.contexts()
    asked = CreateRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    return await _make(service, keeper, request, asked, None)


async def extend_context(service: Service, request: Request) -> Response:
    keeper = service.contexts()
    asked = ExtendRequest.parse(await read_json(request, service.options))
    base = await keeper.open(request.scope["owner"], request.path_params["id"])
    return await _make(service, keeper, request, asked, base)


async def fork_context(service: Service, request: Request) -> Response:
    keeper = service.contexts()
    asked = ForkRequest.parse(await read_json(request, service.options))
    base = await keeper.open(request.scope["owner"], request.path_params["id"])
    wish = _wish(service, request, asked, [], base)
    return JSONResponse(shape(await keeper.fork(wish)))


async def list_contexts(service: Service, request: Request) -> Response:
    records = await service.contexts().records(request.scope["owner"])
    ids = [record.id for record in records]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return JSONResponse({"object": "list", "data": [shape(r) for r in records], "has_more": False, **ends})


async def get_context(service: Service, request: Request) -> Response:
    record = await service.contexts().record(request.scope["owner"], request.path_params["id"])
    return JSONResponse(shape(record))


async def change_context(service: Service, request: Request) -> Response:
    keeper = service.contexts()
    asked = ChangeRequest.parse(await read_json(request, service.options))
    fields = asked.model_dump(exclude_unset=True)
    return JSONResponse(
        shape(await keeper.change(request.scope["owner"], request.path_params["id"], **fields))
    )


async def delete_context(service: Service, request: Request) -> Response:
    context_id = request.path_params["id"]
    await service.contexts().remove(request.scope["owner"], context_id)
    return JSONResponse({"id": context_id, "object": "context.deleted", "deleted": True})


def _wish(
    service: Service,
    request: Request,
    asked: ForkRequest,
    documents: list[Document],
    base: tuple[Record, Kept] | None,
) -> Wish:
    ttl = asked.ttl if asked.ttl is not None else service.options.context_seconds or None
    return Wish(request.scope["owner"], documents, ttl, asked.pinned, base)


async def _make(
    service: Service,
    keeper: Keeper,
    request: Request,
    asked: ExtendRequest,
    base: tuple[Record, Kept] | None,
) -> Response:
    steps = keeper.make(_wish(service, request, asked, asked.read(), base))
    if not asked.stream:
        return JSONResponse(shape(await while_connected(request, _last(steps))))
    return EventStream(
        _events(steps),
        on_error=openai_error,
        on_close=lambda: None,  # the reading ends with whoever listens to it
        write_seconds=service.options.write_seconds,
    )


async def _last(steps: AsyncGenerator[Progress | Record, None]) -> Record:
    async with contextlib.aclosing(steps):
        async for step in steps:
            if isinstance(step, Record):
                return step
    raise AssertionError("a reading ends with a record or an error")


async def _events(steps: AsyncGenerator[Progress | Record, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(steps):
        async for step in steps:
            if isinstance(step, Record):
                yield event(shape(step))
            else:
                yield event(
                    {
                        "id": step.id,
                        "object": "context.progress",
                        "read_tokens": step.read,
                        "tokens": step.tokens,
                    }
                )
    yield DONE
