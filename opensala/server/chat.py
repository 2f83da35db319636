"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..engine import Completion, SamplingParams
from ..engine.calls import CallArguments, CallEnds, Part, Text
from ..engine.chat import ChatPrompt
from .answers import reply
from .errors import ApiError, bad_request
from .http import COMMENT, event, read_json
from .openai_schema import ChatRequest, SamplingRequest
from .output import openai_finish
from .selections import Watch
from .service import Run, Service
from .tools import Shape

DONE = event("[DONE]")


async def chat_completions(service: Service, request: Request) -> Response:
    asked = ChatRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    asked.check_stream_options()
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad_request("Invalid 'top_logprobs': needs logprobs=true", "top_logprobs", "invalid_value")
    kept = await service.kept(request.scope["owner"], asked.context)
    use = asked.tool_use()
    shape = await service.shape(use, asked.grammar(), "response_format")
    prompt = await service.chat(asked.conversation(), kept=kept, tools=use.tools)
    limit, field = _limit(asked)
    new = service.room(len(prompt.ids), limit, service.options.default_new_tokens, field)
    top = asked.top_logprobs or 0
    params = sampling(service, asked, prompt, new, field, top, shape)
    watch = service.selections.watch(request.scope["owner"], asked, len(prompt.ids), kept)
    if watch is not None:
        params = [replace(one, selection=watch.limit) for one in params]
    run = service.submit(request.scope["owner"], [prompt], params, asked.n, kept, shape)
    return await reply(service, request, _Answer(service, asked, run, watch), asked.stream)


def _limit(asked: ChatRequest) -> tuple[int | None, str]:
    if asked.max_completion_tokens is not None:
        return asked.max_completion_tokens, "max_completion_tokens"
    return asked.max_tokens, "max_tokens"


def sampling(
    service: Service,
    asked: SamplingRequest,
    prompt: ChatPrompt,
    new: int,
    field: str,
    logprobs: int,
    shape: Shape | None = None,
) -> list[SamplingParams]:
    """The parameters of each choice: alike but for the seed, which counts on."""
    seeds = [None if asked.seed is None else (asked.seed + i) % (1 << 63) for i in range(asked.n)]
    return [
        service.params(
            {"max_tokens": field},
            max_tokens=new,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=max(0, asked.top_k),
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            seed=seed,
            logprobs=logprobs,
            stop=(*asked.stop, *prompt.stop),
            shape=shape,
            stop_token_ids=tuple(asked.stop_token_ids),
            ignore_eos=asked.ignore_eos,
        )
        for seed in seeds
    ]


def openai_error(error: ApiError) -> bytes:
    return event(error.body("openai", ""))


class OpenAIAnswer:
    """A stream of it that fails ends with an error in OpenAI's shape."""

    def error(self, error: ApiError) -> bytes:
        return openai_error(error)


class _Answer(OpenAIAnswer):
    """One chat completion, whole or as chunks."""

    def __init__(self, service: Service, asked: ChatRequest, run: Run, watch: Watch | None = None) -> None:
        self.service, self.asked, self.run, self.watch = service, asked, run, watch
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.head = {"id": self.id, "created": int(time.time()), "model": service.name}
        self.called = [False] * asked.n  # whether a choice made a whole call

    def _delta(self, index: int, part: Part) -> dict[str, Any]:
        """What a part adds to the message of a choice; empty for the end of a call."""
        if isinstance(part, Text):
            return {"content": part.text}
        if isinstance(part, CallEnds):
            self.called[index] = True
            return {}
        if isinstance(part, CallArguments):
            return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        return {
            "tool_calls": [{"index": part.index, **call, "function": {"name": part.name, "arguments": ""}}]
        }

    def _finish(self, index: int, done: Completion) -> str:
        return openai_finish(done.finish_reason, self.called[index])

    def _logprobs(self, piece_event: Any) -> list[dict[str, Any]] | None:
        if not self.asked.logprobs:
            return None
        shown = self.service.tokens.is_shown(piece_event, self.asked.stop_token_ids)
        return [self.service.tokens.logprob(piece_event)] if shown else []

    def _end(self, completion: Completion) -> None:
        if self.watch is not None:
            self.watch.keep(self.id, completion)

    async def whole(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [
            {"role": "assistant", "content": "", "refusal": None, "annotations": []} for _ in self.called
        ]
        finish = [""] * self.asked.n
        logprobs: list[list[dict[str, Any]]] = [[] for _ in messages]
        async for piece in self.service.pieces(self.run):
            if piece is not None:
                for part in piece.parts:
                    _add(messages[piece.index], self._delta(piece.index, part))
                logprobs[piece.index] += self._logprobs(piece.event) or []
                if piece.completion is not None:
                    self._end(piece.completion)
                    finish[piece.index] = self._finish(piece.index, piece.completion)
        choices: list[dict[str, Any]] = [
            {
                "index": i,
                "message": _whole_message(message),
                "logprobs": {"content": logprobs[i], "refusal": None} if self.asked.logprobs else None,
                "finish_reason": finish[i],
            }
            for i, message in enumerate(messages)
        ]
        return {
            **self.head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.run.usage.openai(),
            "service_tier": "default",
            "system_fingerprint": self.service.fingerprint,
        }

    async def events(self) -> AsyncIterator[bytes]:
        for i in range(self.asked.n):
            yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None})
        async for piece in self.service.pieces(self.run):
            if piece is None:
                yield COMMENT
                continue
            logprobs = self._logprobs(piece.event)
            deltas = [delta for part in piece.parts if (delta := self._delta(piece.index, part))]
            for delta in deltas or ([{"content": ""}] if logprobs else []):
                yield self._chunk(piece.index, delta, logprobs)
                logprobs = [] if logprobs else logprobs  # with the first of them
            if piece.completion is not None:
                self._end(piece.completion)
                yield self._chunk(piece.index, {}, finish=self._finish(piece.index, piece.completion))
        if self._wants_usage:
            yield event(self._frame([], self.run.usage.openai()))
        yield DONE

    @property
    def _wants_usage(self) -> bool:
        return self.asked.stream_options is not None and self.asked.stream_options.include_usage

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        finish: str | None = None,
    ) -> bytes:
        shown = None if logprobs is None else {"content": logprobs, "refusal": None}
        return event(
            self._frame([{"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish}], None)
        )

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        frame = {
            **self.head,
            "object": "chat.completion.chunk",
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }
        return {**frame, "usage": usage} if self._wants_usage else frame


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Make a delta part of a message, as a client would."""
    message["content"] += delta.get("content", "")
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def _whole_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with calls and no text has none, not an empty one."""
    return {**message, "content": None} if "tool_calls" in message and not message["content"] else message
