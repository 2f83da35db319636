"""The page at `/`: documents are dropped on it, read, asked about, and one sees where the model looked.

It is a client of the server's own API, written in JavaScript modules that browsers run as they are: no build
step, and nothing is loaded from elsewhere (`static/vendor` says where the two libraries come from). Its files
need no key, since they hold nothing; what they ask the server for does.
"""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ..errors import ApiError

PREFIX = "/page/"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_SCRIPT = re.compile(r"<script type=\"importmap\">(.*?)</script>", re.S)


def is_page(path: str) -> bool:
    """Whether a path is the page or one of its files."""
    return path == "/" or path.startswith(PREFIX)


def add_page(app: FastAPI) -> None:
    """Serve the page and its files."""
    found = _read()
    policy = _policy(found["index.html"].decode())

    async def get(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        body = found.get(name)
        if body is None:
            raise ApiError(404, f"no such path: {request.url.path[:200]}", code="not_found")
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {**_HEADERS, "content-security-policy": policy, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])

    app.add_api_route("/", get, methods=["GET"], include_in_schema=False)
    app.add_api_route(PREFIX + "{name:path}", get, methods=["GET"], include_in_schema=False)


_HEADERS = {
    "cache-control": "no-cache",  # asked for again each time, sent again only if it changed
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def _read() -> dict[str, bytes]:
    """The files of the page by their path below `/page/`; they are small, and stay in memory."""
    root, found = files(__package__).joinpath("static"), {}
    folders = [("", root)]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            elif entry.name.rpartition(".")[2] in _TYPES:
                found[prefix + entry.name] = entry.read_bytes()
    return found


def _policy(html: str) -> str:
    """What the page may do: run its own modules, and speak to this server. The import map is the one thing
    that has to stand in the page itself; it is allowed by its hash."""
    (inline,) = _SCRIPT.findall(html)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' 'sha256-{digest}'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
