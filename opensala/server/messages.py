"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..contexts.kept import Kept
from ..engine import Completion, FinishReason
from ..engine.chat import ChatPrompt
from .anthropic_schema import CountRequest, MessagesRequest
from .errors import ApiError
from .http import EventStream, event, read_json, while_connected
from .service import Run, Service


async def count_tokens(service: Service, request: Request) -> Response:
    asked = CountRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    prompt = await _prompt(service, asked, await service.kept(request.scope["owner"], asked.context))
    return JSONResponse({"input_tokens": len(prompt.ids)})


async def messages(service: Service, request: Request) -> Response:
    asked = MessagesRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    kept = await service.kept(request.scope["owner"], asked.context)
    prompt = await _prompt(service, asked, kept)
    new = service.room(len(prompt.ids), asked.max_tokens, asked.max_tokens, "max_tokens")
    params = service.params(
        {"stop": "stop_sequences"},
        max_tokens=new,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=(*asked.stop_sequences, *prompt.stop),
    )
    run = service.submit(request.scope["owner"], [prompt], [params], kept=kept)
    answer = _Answer(service, asked, run, request.scope["request_id"])
    if not asked.stream:
        return JSONResponse(await while_connected(request, answer.whole()))
    return EventStream(
        answer.events(),
        on_error=answer.error,
        on_close=run.ticket.cancel,
        write_seconds=service.options.write_seconds,
    )


async def _prompt(service: Service, asked: CountRequest, kept: Kept | None) -> ChatPrompt:
    """A conversation that ends with the assistant's words is continued from there."""
    conversation = asked.conversation()
    return await service.chat(conversation, conversation[-1].role == "assistant", kept)


class _Answer:
    """One message, whole or as events."""

    def __init__(self, service: Service, asked: MessagesRequest, run: Run, request_id: str) -> None:
        self.service, self.asked, self.run, self.request_id = service, asked, run, request_id
        self.id = f"msg_{uuid.uuid4().hex}"

    def _message(self, content: list[dict[str, Any]], done: Completion | None) -> dict[str, Any]:
        reason, sequence = self._stop(done)
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.service.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "stop_details": None,
            "container": None,
            "usage": self.run.usage.anthropic(),
        }

    def _stop(self, done: Completion | None) -> tuple[str | None, str | None]:
        if done is None:
            return None, None
        if done.finish_reason is FinishReason.LENGTH:
            return "max_tokens", None
        if done.stop in self.asked.stop_sequences:
            return "stop_sequence", done.stop
        return "end_turn", None

    async def whole(self) -> dict[str, Any]:
        text, done = "", None
        async for piece in self.service.pieces(self.run):
            if piece is not None:
                text, done = text + piece.text, piece.completion
        return self._message([_block(text)] if text else [], done)

    async def events(self) -> AsyncIterator[bytes]:
        yield _event("message_start", message=self._message([], None))
        yield _event("content_block_start", index=0, content_block=_block(""))
        yield _event("ping")
        done = None
        async for piece in self.service.pieces(self.run):
            if piece is None:
                yield _event("ping")
                continue
            done = piece.completion
            if piece.text:
                yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})
        yield _event("content_block_stop", index=0)
        reason, sequence = self._stop(done)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield _event("message_delta", delta=delta, usage=self.run.usage.anthropic())
        yield _event("message_stop")

    def error(self, error: ApiError) -> bytes:
        return event(error.body("anthropic", self.request_id), "error")


def _block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _event(name: str, **data: Any) -> bytes:
    return event({"type": name, **data}, name)
