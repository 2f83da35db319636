"""POST /v1/responses. Nothing is stored: a response is gone once it was sent."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..engine import FinishReason
from .answers import Block, Blocks, Step, reply
from .errors import ApiError
from .http import COMMENT, event, read_json
from .openai_schema import ResponsesRequest
from .service import Run, Service

_LOGPROBS = "message.output_text.logprobs"


async def responses(service: Service, request: Request) -> Response:
    asked = ResponsesRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    kept = await service.kept(request.scope["owner"], asked.context)
    use = asked.tool_use()
    shape = await service.shape(use, asked.text.grammar(), "text.format")
    prompt = await service.chat(asked.conversation(), kept=kept, tools=use.tools)
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
        shape=shape,
    )
    run = service.submit(request.scope["owner"], [prompt], [params], kept=kept, shape=shape)
    return await reply(service, request, _Answer(service, asked, run), asked.stream)


class _Answer:
    """One response, whole or as events."""

    def __init__(self, service: Service, asked: ResponsesRequest, run: Run) -> None:
        self.service, self.asked, self.run = service, asked, run
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.blocks = Blocks(service, run)
        self.logprobs: dict[int, list[dict[str, Any]]] = {}  # of each block of text
        self.finish: FinishReason | None = None
        self._numbers = itertools.count()

    @property
    def _status(self) -> str:
        if self.finish is None:
            return "in_progress"
        return "incomplete" if self.finish is FinishReason.LENGTH else "completed"

    def _part(self, block: Block) -> dict[str, Any]:
        part: dict[str, Any] = {"type": "output_text", "text": block.text, "annotations": []}
        return part | {"logprobs": self.logprobs.get(block.index, [])}

    def _item(self, block: Block, begun: bool = False) -> dict[str, Any]:
        """A block as an item of the output; without its content if it just `begun`."""
        status = "in_progress" if begun else self._status if self.finish is not None else "completed"
        if block.kind == "call":
            call = {"id": f"fc_{block.id}", "type": "function_call", "call_id": f"call_{block.id}"}
            return {**call, "name": block.name, "arguments": block.text, "status": status}
        content = [] if begun else [self._part(block)]
        return {
            "id": f"msg_{block.id}",
            "type": "message",
            "status": status,
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
            "output": [self._item(block) for block in self.blocks.all] if self.finish is not None else [],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "background": False,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": asked.text.model_dump(exclude_none=True, by_alias=True),
            "tool_choice": asked.choice_as_given,
            "tools": asked.tools_as_given,
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
        async for _ in self._steps():
            pass
        return self._response()

    async def _steps(self) -> AsyncIterator[tuple[Step, list[dict[str, Any]]] | None]:
        """Steps of the answer's blocks, each with the log-probabilities that belong to it."""
        wanted = self.asked.top_logprobs > 0 or _LOGPROBS in self.asked.include
        async for step in self.blocks.steps():
            if step is None:
                yield None
                continue
            tokens, shown = self.service.tokens, list[dict[str, Any]]()
            if wanted and step.event is not None and tokens.is_shown(step.event, []):
                shown = [_with_bytes(tokens.logprob(step.event))] if step.block.kind == "text" else []
            self.logprobs.setdefault(step.block.index, []).extend(shown)
            if self.blocks.done is not None:
                self.finish = self.blocks.done.finish_reason
            yield step, shown

    async def events(self) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())
        async for found in self._steps():
            if found is None:
                yield COMMENT
                continue
            tell = self._tell_text if found[0].block.kind == "text" else self._tell_call
            for data in tell(*found):
                yield data
        yield self._event(f"response.{self._status}", response=self._response())

    def _tell_text(self, step: Step, logprobs: list[dict[str, Any]]) -> Iterator[bytes]:
        block = step.block
        item = {"output_index": block.index, "item": self._item(block, begun=step.what == "begin")}
        place = {"item_id": f"msg_{block.id}", "output_index": block.index, "content_index": 0}
        if step.what == "begin":
            yield self._event("response.output_item.added", **item)
            yield self._event("response.content_part.added", **place, part=self._part(block))
        elif step.what == "end":
            part = self._part(block)
            yield self._event(
                "response.output_text.done", **place, text=block.text, logprobs=part["logprobs"]
            )
            yield self._event("response.content_part.done", **place, part=part)
            yield self._event("response.output_item.done", **item)
        elif step.delta or logprobs:
            yield self._event("response.output_text.delta", **place, delta=step.delta, logprobs=logprobs)

    def _tell_call(self, step: Step, logprobs: list[dict[str, Any]]) -> Iterator[bytes]:
        block = step.block
        item = {"output_index": block.index, "item": self._item(block, begun=step.what == "begin")}
        place = {"item_id": f"fc_{block.id}", "output_index": block.index}
        if step.what == "begin":
            yield self._event("response.output_item.added", **item)
        elif step.what == "end":
            yield self._event("response.function_call_arguments.done", **place, arguments=block.text)
            yield self._event("response.output_item.done", **item)
        else:
            yield self._event("response.function_call_arguments.delta", **place, delta=step.delta)

    def error(self, error: ApiError) -> bytes:
        self.finish = None
        return self._event("response.failed", response=self._response("failed", error))

    def _event(self, name: str, **data: Any) -> bytes:
        return event({"type": name, "sequence_number": next(self._numbers), **data}, name)


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """Here the bytes of a part of a character are an empty list, not null."""
    top = [{**t, "bytes": t["bytes"] or []} for t in entry["top_logprobs"]]
    return {**entry, "bytes": entry["bytes"] or [], "top_logprobs": top}
