"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine import Completion, SamplingParams
from ..engine.chat import ChatPrompt
from .errors import ApiError, bad_request
from .http import COMMENT, EventStream, event, read_json, while_connected
from .openai_schema import ChatRequest, SamplingRequest
from .output import openai_finish
from .selections import Watch
from .service import Run, Service

DONE = event("[DONE]")


async def chat_completions(service: Service, request: Request) -> Response:
    asked = ChatRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    asked.check_stream_options()
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad_request("Invalid 'top_logprobs': needs logprobs=true", "top_logprobs", "invalid_value")
    kept = await service.kept(request.scope["owner"], asked.context)
    prompt = await service.chat(asked.conversation(), kept=kept)
    limit, field = _limit(asked)
    new = service.room(len(prompt.ids), limit, service.options.default_new_tokens, field)
    top = asked.top_logprobs or 0
    params = sampling(service, asked, prompt, new, field, top)
    watch = service.selections.watch(request.scope["owner"], asked, len(prompt.ids), kept)
    if watch is not None:
        params = [replace(one, selection=watch.limit) for one in params]
    run = service.submit(request.scope["owner"], [prompt], params, asked.n, kept)
    answer = _Answer(service, asked, run, watch)
    if asked.stream:
        return stream(service, run, answer.events())
    return JSONResponse(await while_connected(request, answer.whole()))


def _limit(asked: ChatRequest) -> tuple[int | None, str]:
    if asked.max_completion_tokens is not None:
        return asked.max_completion_tokens, "max_completion_tokens"
    return asked.max_tokens, "max_tokens"


def sampling(
    service: Service, asked: SamplingRequest, prompt: ChatPrompt, new: int, field: str, logprobs: int
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
            stop_token_ids=tuple(asked.stop_token_ids),
            ignore_eos=asked.ignore_eos,
        )
        for seed in seeds
    ]


def stream(service: Service, run: Run, events: AsyncIterator[bytes]) -> EventStream:
    """A stream in which errors have OpenAI's shape."""
    return EventStream(
        events,
        on_error=openai_error,
        on_close=run.ticket.cancel,
        write_seconds=service.options.write_seconds,
    )


def openai_error(error: ApiError) -> bytes:
    return event(error.body("openai", ""))


class _Answer:
    """One chat completion, whole or as chunks."""

    def __init__(self, service: Service, asked: ChatRequest, run: Run, watch: Watch | None = None) -> None:
        self.service, self.asked, self.run, self.watch = service, asked, run, watch
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }

    def _logprobs(self, piece_event: Any) -> list[dict[str, Any]] | None:
        if not self.asked.logprobs:
            return None
        shown = self.service.tokens.is_shown(piece_event, self.asked.stop_token_ids)
        return [self.service.tokens.logprob(piece_event)] if shown else []

    def _end(self, completion: Completion) -> None:
        if self.watch is not None:
            self.watch.keep(self.head["id"], completion)

    async def whole(self) -> dict[str, Any]:
        texts, finish = [""] * self.asked.n, [""] * self.asked.n
        logprobs: list[list[dict[str, Any]]] = [[] for _ in range(self.asked.n)]
        async for piece in self.service.pieces(self.run):
            if piece is not None:
                texts[piece.index] += piece.text
                logprobs[piece.index] += self._logprobs(piece.event) or []
                if piece.completion is not None:
                    self._end(piece.completion)
                    finish[piece.index] = openai_finish(piece.completion.finish_reason)
        choices: list[dict[str, Any]] = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": {"content": logprobs[i], "refusal": None} if self.asked.logprobs else None,
                "finish_reason": finish[i],
            }
            for i, text in enumerate(texts)
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
            if piece.text or logprobs:
                yield self._chunk(piece.index, {"content": piece.text}, logprobs)
            if piece.completion is not None:
                self._end(piece.completion)
                yield self._chunk(piece.index, {}, finish=openai_finish(piece.completion.finish_reason))
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
