"""Running a server: uvicorn, with connections that can be cut, and an end that streams survive.

Loopback by default. A server that others can reach needs keys.
"""

import asyncio
import gc
import ipaddress
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .errors import bad_request
from .keys import KeyFile
from .service import Service

_log = logging.getLogger("opensala.server")
_HEADER_SECONDS = 20.0  # for a connection to send a request's headers
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class _Protocol(H11Protocol):
    """Tells the application its connection, and drops one that sends no whole request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        inner = self.app

        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope["transport"] = transport
            await inner(scope, receive, send)

        self.app = app
        self._watch = self.loop.call_later(_HEADER_SECONDS, self._drop_if_idle, None)

    def _drop_if_idle(self, last: object) -> None:
        """Drop the connection if no request came since the last look, when `last` was its latest one."""
        if self.cycle is last and (last is None or self.cycle.response_complete):
            self.transport.abort()
            return
        self._watch = self.loop.call_later(_HEADER_SECONDS, self._drop_if_idle, self.cycle)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in OpenAI's shape: which API was meant cannot be known."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way, or over
            self.transport.abort()
            return
        error = bad_request("The request is not valid HTTP", code="invalid_http")
        body = json.dumps(error.body("openai", "")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        head = self.conn.send(h11.Response(status_code=400, headers=headers))
        self.transport.write(head + self.conn.send(h11.Data(data=body)))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Ends the engine's work first when it is told to stop, so that every stream gets its end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.announce: Callable[[str, str, int], None] | None = None  # called with URL, model and context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.announce is not None and self.started:
            self.announce(self.url, self.service.name, self.service.context)

    @property
    def url(self) -> str:
        """Where the server is, once it has started."""
        host = self.config.host
        port = self.servers[0].sockets[0].getsockname()[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # no new connections, while those under way come to their end
        await self.service.close()
        await super().shutdown(sockets)
        self._captured_signals.clear()  # to stop is what they asked for; uvicorn would raise them once more


def settle() -> None:
    """Before a process serves for good: leave what is loaded out of garbage collections from now on.

    A full one looks at a million objects of torch and transformers, for a quarter of a second in which no
    stream goes on.
    """
    gc.collect()
    gc.freeze()


def is_loopback(host: str) -> bool:
    """Whether a host to bind to can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def build_server(service: Service, host: str = "127.0.0.1", port: int = 8000) -> Server:
    """A server that is not running yet (`run` or `await serve()` starts it).

    Raises:
        ValueError: the host can be reached by others and there are no keys; a port out of range.
    """
    _check_exposure(host, port, service.keys)
    hosts = None if service.keys is not None else _LOCAL_NAMES | {host.lower()}
    config = uvicorn.Config(
        create_app(service, hosts),
        host=host.strip("[]"),
        port=port,
        http=_Protocol,
        loop="asyncio",  # also where uvloop is installed: what was tested is what runs
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    return Server(config, service)


def _check_exposure(host: str, port: int, keys: KeyFile | None) -> None:
    if not 0 <= port < 65536:
        raise ValueError(f"port must be from 0 to 65535, got {port}")
    if keys is None and not is_loopback(host):
        raise ValueError(
            f"host {host!r} can be reached from other machines and there are no API keys: make some with "
            "`opensala serve keys new NAME` and give --keys, or bind to 127.0.0.1"
        )
    if keys is not None and not keys.keys():
        raise ValueError(
            f"{keys.path} has no keys, so nobody could ask: make one with `opensala serve keys new NAME`"
        )


def check_bind(host: str, port: int, keys: KeyFile | None) -> None:
    """Refuse an address before the model is loaded.

    Raises:
        ValueError: see `build_server`; it cannot be bound.
    """
    _check_exposure(host, port, keys)
    bare = host.strip("[]")
    try:
        family = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((bare, port))
    except OSError as error:
        raise ValueError(f"host {host!r}, port {port} cannot be bound: {error.strerror or error}") from error
