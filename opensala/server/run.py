"""Running a server: uvicorn, with connections that can be cut, and an end that streams survive.

Loopback by default. A server that others can reach needs keys.
"""

import asyncio
import ipaddress
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
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
        self._watch = self.loop.call_later(_HEADER_SECONDS, self._drop_if_idle)

    def _drop_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(_HEADER_SECONDS, self._drop_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Ends the engine's work first when it is told to stop, so that every stream gets its end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # no new connections, while those under way come to their end
        await self.service.close()
        await super().shutdown(sockets)


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
    if not 0 <= port < 65536:
        raise ValueError(f"port must be from 0 to 65535, got {port}")
    local = is_loopback(host)
    if service.keys is None and not local:
        raise ValueError(
            f"host {host!r} can be reached from other machines and there are no API keys: make some with "
            "`opensala serve keys new` and give --keys, or bind to 127.0.0.1"
        )
    hosts = _LOCAL_NAMES | {host.lower()} if local and service.keys is None else None
    config = uvicorn.Config(
        create_app(service, hosts),
        host=host.strip("[]"),
        port=port,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    return Server(config, service)


def check_port(host: str, port: int) -> None:
    """Refuse a port in use before the model is loaded.

    Raises:
        ValueError: it cannot be bound.
    """
    bare = host.strip("[]")
    try:
        family = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((bare, port))
    except OSError as error:
        raise ValueError(f"host {host!r}, port {port} cannot be bound: {error.strerror or error}") from error
