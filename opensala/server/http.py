"""HTTP without an API's opinions: reading a body, streaming events, noticing that the client went away."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import Api, ApiError, bad_request
from .limits import ServerOptions

T = TypeVar("T")
COMMENT = b": still at work\n\n"  # clients pass over it; proxies see life


class Gone(Exception):
    """The client went away: nobody reads an answer."""


def api_of(scope: Scope) -> Api:
    """Whose shape an answer to this request has."""
    if scope["path"].startswith("/v1/messages"):
        return "anthropic"
    named = any(name == b"anthropic-version" for name, _ in scope["headers"])
    return "anthropic" if named and scope["path"].startswith("/v1/models") else "openai"


async def read_json(request: Request, options: ServerOptions) -> Any:
    """The body of a request, parsed.

    Raises:
        ApiError: too large (413), too slow (408), or not JSON (400).
        Gone: the client went away before its end.
    """
    body = await _read_body(request, options)
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(
            f"The request's body is not UTF-8 (byte {error.start})", code="invalid_json"
        ) from None
    except RecursionError:
        raise bad_request("The request's body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(
            f"The request's body is not valid JSON: {error}"[:300], code="invalid_json"
        ) from None


async def _read_body(request: Request, options: ServerOptions) -> bytes:
    most = options.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > most:
        raise _too_large(most)
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), options.body_seconds)
        except TimeoutError:
            seconds = options.body_seconds
            raise ApiError(
                408, f"no more of the request's body came for {seconds:g} s", code="timeout"
            ) from None
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The request's body is larger than {most:,} bytes", code="request_too_large")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first.

    Raises:
        Gone: it did.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await _end(task, watcher)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)  # their outcome was looked at, or is void


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event. Non-ASCII is escaped: some clients break lines at U+2028."""
    head = b"" if name is None else f"event: {name}\n".encode()
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return head + f"data: {text}\n\n".encode()


class EventStream(Response):
    """A stream of server-sent events.

    It ends when the client goes away, or does not take what it was sent for `write_seconds`.

    Args:
        events: encoded events.
        on_error: an error's event in the shape of the API.
        on_close: called at the end, whatever it was.
        write_seconds: see above.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_error: Callable[[ApiError], bytes],
        on_close: Callable[[], None],
        write_seconds: float,
    ) -> None:
        self._events, self._on_error, self._on_close = events, on_error, on_close
        self._write_seconds = write_seconds
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            self._on_close()
            await _end(writer, watcher)

    async def _write(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            data = self._on_error(error)
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        finally:  # also if the client went away between two events: what they come from is to end now
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        """Raises Gone if the client does not read: the connection is then cut in the middle of the answer."""
        try:
            await asyncio.wait_for(_awaited(send(message)), self._write_seconds)
        except TimeoutError:
            raise Gone from None


async def _awaited(sending: Awaitable[None]) -> None:
    await sending
