"""What stands before every route: whose request it is, whether it may come in, and what it is called.

Plain ASGI, so that a request that is streamed counts until its stream ends.
"""

import asyncio
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, shutting_down
from .http import Gone, api_of
from .page import is_page
from .service import Service

_log = logging.getLogger("opensala.server")
_OPEN = ("/health",)  # paths that need no key


class Guard:
    """Authentication, limits, request ids and counting, around an application.

    Args:
        app: the application.
        service: what it serves.
        hosts: names by which the server may be addressed; None for any. A server without keys on this machine
            is open to every page in its user's browser but for this: a name that a page's owner points here
            is not in the list.
    """

    def __init__(self, app: ASGIApp, service: Service, hosts: frozenset[str] | None = None) -> None:
        self.app, self.service, self.hosts = app, service, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope["request_id"] = f"req_{uuid.uuid4().hex}"
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
            await send(message)

        try:
            await self._admit(scope, receive, answer)
        except ApiError as error:
            await _refuse(error, scope, receive, answer)
        except Gone:
            await _cut(scope)
        except asyncio.CancelledError:
            if not self.service.closing:
                raise
            # It was not over when the server's patience was: uvicorn ends it, or a pool of threads that is
            # closed.
            if status:
                await _cut(scope)
            else:
                await _refuse(shutting_down(), scope, receive, answer)
        except Exception:  # a defect of ours: the log has it, the client is told no more than that it was one
            _log.exception("a request failed")
            if status:  # in the middle of an answer
                await _cut(scope)
            else:
                defect = ApiError(500, "the server failed on this request; its log says how")
                await _refuse(defect, scope, receive, answer)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.service.metrics.requests.labels(path, str(status or 499)).inc()

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        owner = scope["owner"] = self._owner(scope["path"], headers)
        if scope["method"] not in ("POST", "PATCH"):
            await self.app(scope, receive, send)
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"content-type must be application/json, got {kind[:60]!r}",
                code="unsupported_media_type",
            )
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise ApiError(
                415,
                f"content-encoding {coding[:60]!r} is not read: send the body as it is",
                code="unsupported_media_type",
            )
        self.service.gate.enter(owner)
        try:
            await self.app(scope, receive, send)
        finally:
            self.service.gate.leave(owner)

    def _check_host(self, headers: Headers) -> None:
        if self.hosts is None:
            return
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in self.hosts:
            raise ApiError(
                403, f"this server does not answer to the name {name[:100]!r}", code="forbidden_host"
            )

    def _owner(self, path: str, headers: Headers) -> str:
        """The id of the key that was presented; "" for a server without keys."""
        keys = self.service.keys
        if keys is None or path in _OPEN or is_page(path):
            return ""
        bearer = headers.get("authorization", "")
        scheme, _, token = bearer.partition(" ")
        presented = headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")
        if not presented:
            raise ApiError(
                401,
                "no API key: give one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
            )
        key = keys.owner(presented)
        if key is None:
            raise ApiError(401, "incorrect API key", code="invalid_api_key")
        return key.id


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    body = error.body(api_of(scope), scope["request_id"])
    await JSONResponse(body, error.status, headers=error.headers)(scope, receive, send)


async def _cut(scope: Scope) -> None:
    """Drop a connection that nobody reads from, with what is in its buffers."""
    transport = scope.get("transport")
    if transport is not None:
        transport.abort()
        started = time.monotonic()
        while not transport.is_closing() and time.monotonic() - started < 1:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
