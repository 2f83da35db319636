"""POST /v1/responses. Nothing is stored: a response is gone once it was sent."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine import FinishReason
from .errors import ApiError
from .http import COMMENT, EventStream, event, read_json, while_connected
from .openai_schema import ResponsesRequest
from .service import Run, Service

_LOGPROBS = "message.output_text.logprobs"


async def responses(service: Service, request: Request) -> Response:
    asked = ResponsesRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    kept = await service.kept(request.scope["owner"], asked.context)
    prompt = await service.chat(asked.conversation(), kept=kept)
    new = service.room(
        len(prompt.ids), asked.max_output_tokens, service.options.default_new_tokens, "max_output_tokens"
    )
    params = service.params(
        {"max_tokens": "max_output_tokens"},
        max_tokens=new,
        temperature=asked.temperature,
        top_p=asked.top_p,
        logprobs=asked.top_logprobs,
        stop=prompt.stop,
    )
    run = service.submit(request.scope["owner"], [prompt], [params], kept=kept)
    answer = _Answer(service, asked, run)
    if not asked.stream:
        return JSONResponse(await while_connected(request, answer.whole()))
    return EventStream(
        answer.events(),
        on_error=answer.error,
        on_close=run.ticket.cancel,
        write_seconds=service.options.write_seconds,
    )


class _Answer:
    """One response, whole or as events."""

    def __init__(self, service: Service, asked: ResponsesRequest, run: Run) -> None:
        self.service, self.asked, self.run = service, asked, run
        self.id, self.item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created, self.text, self.logprobs = int(time.time()), "", list[dict[str, Any]]()
        self.finish: FinishReason | None = None
        self._numbers = itertools.count()

    @property
    def _status(self) -> str:
        if self.finish is None:
            return "in_progress"
        return "incomplete" if self.finish is FinishReason.LENGTH else "completed"

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": "output_text", "text": self.text, "annotations": []}
        return part | {"logprobs": self.logprobs}

    def _item(self, begun: bool = True) -> dict[str, Any]:
        content = [self._part()] if begun else []
        return {
            "id": self.item_id,
            "type": "message",
            "status": self._status,
            "role": "assistant",
            "content": content,
        }

    def _response(self, status: str | None = None, error: ApiError | None = None) -> dict[str, Any]:
        asked, status = self.asked, status or self._status
        params = self.run.ticket.jobs[0].params
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.service.name,
            "output": [self._item()] if self.finish is not None else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "background": False,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": asked.top_logprobs,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "truncation": "disabled",
            "usage": None if self.finish is None else self.run.usage.responses(),
            "user": None,
            "metadata": asked.metadata,
            "max_tool_calls": None,
            "prompt_cache_key": None,
            "safety_identifier": None,
        }

    async def whole(self) -> dict[str, Any]:
        async for _ in self._deltas():
            pass
        return self._response()

    async def _deltas(self) -> AsyncIterator[tuple[str, list[dict[str, Any]]] | None]:
        wanted = self.asked.top_logprobs > 0 or _LOGPROBS in self.asked.include
        async for piece in self.service.pieces(self.run):
            if piece is None:
                yield None
                continue
            shown = wanted and self.service.tokens.is_shown(piece.event, [])
            logprobs = [_with_bytes(self.service.tokens.logprob(piece.event))] if shown else []
            self.text += piece.text
            self.logprobs += logprobs
            if piece.completion is not None:
                self.finish = piece.completion.finish_reason
            if piece.text or logprobs:
                yield piece.text, logprobs

    async def events(self) -> AsyncIterator[bytes]:
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())
        yield self._event("response.output_item.added", output_index=0, item=self._item(begun=False))
        yield self._event("response.content_part.added", **place, part=self._part())
        async for delta in self._deltas():
            if delta is None:
                yield COMMENT
            else:
                yield self._event("response.output_text.delta", **place, delta=delta[0], logprobs=delta[1])
        yield self._event("response.output_text.done", **place, text=self.text, logprobs=self.logprobs)
        yield self._event("response.content_part.done", **place, part=self._part())
        yield self._event("response.output_item.done", output_index=0, item=self._item())
        yield self._event(f"response.{self._status}", response=self._response())

    def error(self, error: ApiError) -> bytes:
        self.finish = None
        return self._event("response.failed", response=self._response("failed", error))

    def _event(self, name: str, **data: Any) -> bytes:
        return event({"type": name, "sequence_number": next(self._numbers), **data}, name)


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """Here the bytes of a part of a character are an empty list, not null."""
    top = [{**t, "bytes": t["bytes"] or []} for t in entry["top_logprobs"]]
    return {**entry, "bytes": entry["bytes"] or [], "top_logprobs": top}
