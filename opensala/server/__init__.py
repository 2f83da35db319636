"""The engine behind the HTTP APIs that clients speak: OpenAI's and Anthropic's. Imports the engine only.

It needs the extra `serve` (fastapi, uvicorn, pydantic, prometheus-client).
"""

from .app import create_app
from .keys import Key, KeyFile, list_keys, new_key, revoke_key
from .limits import ServerOptions
from .loop import EngineLoop, Job, Ticket
from .run import Server, build_server, check_bind, is_loopback, settle
from .service import Service

__all__ = [
    "EngineLoop",
    "Job",
    "Key",
    "KeyFile",
    "Server",
    "ServerOptions",
    "Service",
    "Ticket",
    "build_server",
    "check_bind",
    "create_app",
    "is_loopback",
    "list_keys",
    "new_key",
    "revoke_key",
    "settle",
]
