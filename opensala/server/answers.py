"""What the answers of all APIs have in common: whole or as a stream, and in blocks where an API has them."""

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine import Completion, TokenEvent
from ..engine.calls import CallArguments, CallBegins, Part, Text
from .errors import ApiError
from .http import EventStream, while_connected
from .service import Run, Service


class Answer(Protocol):
    """One answer, in the shape of an API."""

    @property
    def run(self) -> Run: ...

    async def whole(self) -> dict[str, Any]:
        """The answer once it is complete."""

    def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""

    def error(self, error: ApiError) -> bytes:
        """What a stream ends with that fails."""


async def reply(service: Service, request: Request, answer: Answer, stream: bool) -> Response:
    """Send an answer, which ends with its client.

    Raises:
        Gone: the client went away.
        ApiError: see `Service.pieces`.
    """
    if not stream:
        return JSONResponse(await while_connected(request, answer.whole()))
    return EventStream(
        answer.events(),
        on_error=answer.error,
        on_close=answer.run.ticket.cancel,
        write_seconds=service.options.write_seconds,
    )


@dataclass
class Block:
    """A part of an answer that has a place of its own.

    Attributes:
        index: its place.
        kind: text, or a call of a tool.
        text: so far; of a call, its arguments' JSON.
        name: of the tool.
        id: random letters, for ids of every API.
        is_whole: whether it came to its end.
    """

    index: int
    kind: Literal["text", "call"]
    text: str = ""
    name: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    is_whole: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Of a call; none if its end was cut off."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Step:
    """What happens to a block: it begins, grows by `delta` (it may be empty, beside a token), or ends."""

    what: Literal["begin", "delta", "end"]
    block: Block
    delta: str = ""
    event: TokenEvent | None = None


class Blocks:
    """An answer in blocks.

    Args:
        service: see `Service.pieces`.
        run: of one choice. Without tools it is one block of text, which begins before the first token.

    Attributes:
        all: blocks so far.
        done: the completion, at the end.
    """

    def __init__(self, service: Service, run: Run) -> None:
        self.service, self.run = service, run
        self.all: list[Block] = []
        self.done: Completion | None = None

    @property
    def calls(self) -> list[Block]:
        """The calls that are complete."""
        return [block for block in self.all if block.kind == "call" and block.is_whole]

    async def steps(self) -> AsyncIterator[Step | None]:
        """What happens, to the end; None where there was nothing to say for a while.

        Raises:
            ApiError: see `Service.pieces`.
        """
        if not self.run.has_tools:
            yield self._begin("text")
        async for piece in self.service.pieces(self.run):
            if piece is None:
                yield None
                continue
            self.done = piece.completion
            for part in piece.parts:
                for step in self._take(part, piece.event):
                    yield step
            if not piece.parts and self.all and self.all[-1].kind == "text":
                yield Step("delta", self.all[-1], "", piece.event)
        if not self.all:
            yield self._begin("text")
        for step in self._end():
            yield step

    def _take(self, part: Part, event: TokenEvent) -> Iterator[Step]:
        last = self.all[-1] if self.all else None
        if isinstance(part, CallBegins) or (isinstance(part, Text) and (last is None or last.kind == "call")):
            yield from self._end()
            yield self._begin("call" if isinstance(part, CallBegins) else "text", getattr(part, "name", ""))
        if isinstance(part, (Text, CallArguments)):
            self.all[-1].text += part.text
            yield Step("delta", self.all[-1], part.text, event)
        elif not isinstance(part, CallBegins):
            self.all[-1].is_whole = True

    def _begin(self, kind: Literal["text", "call"], name: str = "") -> Step:
        self.all.append(Block(len(self.all), kind, name=name))
        return Step("begin", self.all[-1])

    def _end(self) -> Iterator[Step]:
        if self.all:
            self.all[-1].is_whole = self.all[-1].is_whole or self.all[-1].kind == "text"
            yield Step("end", self.all[-1])
