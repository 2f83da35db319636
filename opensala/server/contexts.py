"""/v1/contexts: documents that are uploaded and read once, then named by an id in any request."""

import asyncio
import base64
import binascii
import contextlib
import io
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Annotated, Any, TypeVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..contexts.kept import Kept
from ..contexts.shelf import Record
from ..engine import Document
from ..engine.decode import text_or_pdf
from ..engine.documents import shown
from .chat import DONE, openai_error
from .errors import ApiError, bad_request, too_slow
from .http import EventStream, event, read_json, while_connected
from .keeping import Keeper, Progress, Wish
from .schema import ApiRequest, Strict
from .service import Service

T = TypeVar("T")
_LONGEST_TTL = 10 * 365 * 86_400  # seconds
Ttl = Annotated[int, Field(ge=1, le=_LONGEST_TTL, description="Seconds that it is kept from now on.")]


class DocumentPart(Strict):
    """A document: its name stands above its text where there are several. Either its `text`, or `data`, the
    bytes of a file in base64, which is read as the command line reads files: UTF-8, UTF-16, PDF."""

    name: Annotated[str, Field(min_length=1, max_length=500)] = "document"
    text: Annotated[str, Field(min_length=1)] | None = None
    data: Annotated[str, Field(min_length=1)] | None = None

    def content(self, place: str) -> str | bytes:
        """Its text, or the bytes of the PDF that it is.

        Raises:
            ApiError: 400, there is no text.
        """
        if (self.text is None) == (self.data is None):
            raise bad_request(f"Give either '{place}.text' or '{place}.data'", f"{place}.text")
        if self.data is not None:
            try:
                return text_or_pdf(io.BytesIO(base64.b64decode(self.data, validate=True)))
            except binascii.Error as error:
                place += ".data"
                raise bad_request(f"Invalid '{place}': no base64 ({error})", place, "invalid_value") from None
            except ValueError as error:
                raise self.unreadable(place, error) from None
        place, text = f"{place}.text", self.text or ""
        if not text.strip() or "\0" in text:
            blank = not text.strip()
            what = "it has no text" if blank else "it holds zero bytes, which no text has"
            raise bad_request(f"Invalid '{place}': {what}", place, "invalid_value")
        return text.replace("\r\n", "\n")

    def unreadable(self, place: str, error: ValueError) -> ApiError:
        return bad_request(f"{shown(self.name)}: {error}", f"{place}.data", "unreadable_document")


class ForkRequest(ApiRequest):
    """POST /v1/contexts/{id}/fork."""

    ttl: Ttl | None = None
    pinned: bool = False


class ExtendRequest(ForkRequest):
    """POST /v1/contexts/{id}/extend."""

    documents: Annotated[list[DocumentPart], Field(min_length=1, max_length=10_000)]
    stream: bool = False

    async def read(self, service: Service, owner: str) -> tuple[list[Document], list[str]]:
        """The documents as the command line would read them from files, and remarks on what is missing of
        them.

        Raises:
            ApiError: 400, one without text.
        """
        parts = {f"documents[{number}]": part for number, part in enumerate(self.documents)}
        contents = await service.aside(lambda _: [part.content(place) for place, part in parts.items()])
        documents, notes = [], []
        for (place, part), content in zip(parts.items(), contents, strict=True):
            name = shown(part.name)
            if isinstance(content, bytes):
                try:
                    content, remarks = await service.pdfs.read(owner, content)
                except ValueError as error:
                    raise part.unreadable(place, error) from None
                notes += [f"{name}: {remark}" for remark in remarks]
            documents.append(Document(name, content))
        return documents, notes


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


def _with_notes(record: Record, notes: list[str]) -> dict[str, Any]:
    """A new context, and remarks on what is missing of its documents, if there are any."""
    return shape(record) | ({"notes": notes} if notes else {})


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
    # A PDF takes a while, or waits for others to be read.
    reading = _in_time(asked.read(service, request.scope["owner"]), service.options.request_seconds)
    documents, notes = await while_connected(request, reading)
    steps = keeper.make(_wish(service, request, asked, documents, base))
    if not asked.stream:
        return JSONResponse(_with_notes(await while_connected(request, _last(steps)), notes))
    return EventStream(
        _events(steps, notes),
        on_error=openai_error,
        on_close=lambda: None,  # the reading ends with whoever listens to it
        write_seconds=service.options.write_seconds,
    )


async def _in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise too_slow(seconds) from None


async def _last(steps: AsyncGenerator[Progress | Record, None]) -> Record:
    async with contextlib.aclosing(steps):
        async for step in steps:
            if isinstance(step, Record):
                return step
    raise AssertionError("a reading ends with a record or an error")


async def _events(steps: AsyncGenerator[Progress | Record, None], notes: list[str]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(steps):
        async for step in steps:
            if isinstance(step, Record):
                yield event(_with_notes(step, notes))
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
