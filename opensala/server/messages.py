"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..contexts.kept import Kept
from ..engine import Completion, FinishReason
from ..engine.chat import ChatPrompt
from .answers import Block, Blocks, Step, reply
from .anthropic_schema import CountRequest, MessagesRequest
from .errors import ApiError
from .http import event, read_json
from .service import Run, Service
from .tools import ToolUse


async def count_tokens(service: Service, request: Request) -> Response:
    asked = CountRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    prompt = await _prompt(service, asked, await service.kept(request.scope["owner"], asked.context))
    return JSONResponse({"input_tokens": len(prompt.ids)})


async def messages(service: Service, request: Request) -> Response:
    asked = MessagesRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    kept = await service.kept(request.scope["owner"], asked.context)
    shape = await service.shape(asked.tool_use(), asked.grammar(), "output_config.format")
    prompt = await _prompt(service, asked, kept)
    new = service.room(len(prompt.ids), asked.max_tokens, asked.max_tokens, "max_tokens")
    params = service.params(
        {"stop": "stop_sequences"},
        max_tokens=new,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=(*asked.stop_sequences, *prompt.stop),
        shape=shape,
    )
    run = service.submit(request.scope["owner"], [prompt], [params], kept=kept, shape=shape)
    answer = _Answer(service, asked, run, request.scope["request_id"])
    return await reply(service, request, answer, asked.stream)


async def _prompt(service: Service, asked: CountRequest, kept: Kept | None) -> ChatPrompt:
    """A conversation that ends with the assistant's words is continued from there."""
    conversation = asked.conversation()
    tools = asked.tool_use().tools
    if tools:  # a template that does not show them would count and read less than was sent
        await service.shape(ToolUse(tools), None, "tools")
    return await service.chat(conversation, conversation[-1].role == "assistant", kept, tools)


class _Answer:
    """One message, whole or as events."""

    def __init__(self, service: Service, asked: MessagesRequest, run: Run, request_id: str) -> None:
        self.service, self.asked, self.run, self.request_id = service, asked, run, request_id
        self.id = f"msg_{uuid.uuid4().hex}"
        self.blocks = Blocks(service, run)

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
        if self.blocks.calls:
            return "tool_use", None
        return "end_turn", None

    async def whole(self) -> dict[str, Any]:
        async for _ in self.blocks.steps():
            pass
        said = [block for block in self.blocks.all if block.text or block.kind == "call"]
        return self._message([_block(block, begun=False) for block in said], self.blocks.done)

    async def events(self) -> AsyncIterator[bytes]:
        yield _event("message_start", message=self._message([], None))
        if self.run.has_tools:
            yield _event("ping")
        async for step in self.blocks.steps():
            if step is None:
                yield _event("ping")
            elif step.what == "begin":
                yield _event("content_block_start", index=step.block.index, content_block=_block(step.block))
                if not step.block.index and not self.run.has_tools:
                    yield _event("ping")
            elif step.what == "end":
                yield _event("content_block_stop", index=step.block.index)
            elif step.delta:
                yield _event("content_block_delta", index=step.block.index, delta=_delta(step))
        reason, sequence = self._stop(self.blocks.done)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield _event("message_delta", delta=delta, usage=self.run.usage.anthropic())
        yield _event("message_stop")

    def error(self, error: ApiError) -> bytes:
        return event(error.body("anthropic", self.request_id), "error")


def _block(block: Block, begun: bool = True) -> dict[str, Any]:
    """A block as it is, or without its content as it is when it begins."""
    if block.kind == "text":
        return {"type": "text", "text": "" if begun else block.text, "citations": None}
    call = {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name}
    return {**call, "input": {} if begun else block.arguments, "caller": {"type": "direct"}}


def _delta(step: Step) -> dict[str, Any]:
    if step.block.kind == "text":
        return {"type": "text_delta", "text": step.delta}
    return {"type": "input_json_delta", "partial_json": step.delta}


def _event(name: str, **data: Any) -> bytes:
    return event({"type": name, **data}, name)
