"""POST /v1/completions: prompts that are taken as they are."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..engine import TokenEvent
from .answers import reply
from .chat import DONE, OpenAIAnswer, sampling
from .errors import bad_request
from .http import COMMENT, event, read_json
from .openai_schema import MAX_CHOICES, CompletionRequest
from .output import openai_finish
from .service import Run, Service

_DEFAULT_TOKENS = 16  # as OpenAI has it


async def completions(service: Service, request: Request) -> Response:
    asked = CompletionRequest.parse(await read_json(request, service.options))
    service.check_model(asked.model)
    asked.check_stream_options()
    if asked.echo and asked.logprobs is not None:
        raise bad_request("Unsupported: 'echo' together with 'logprobs'", "echo", "unsupported_parameter")
    if asked.n * len(asked.prompt) > 4 * MAX_CHOICES:
        most = 4 * MAX_CHOICES
        raise bad_request(
            f"Invalid 'n': prompts times n must be at most {most}, got {asked.n * len(asked.prompt)}", "n"
        )
    kept = await service.kept(request.scope["owner"], asked.context)
    prompts = [await service.raw(prompt, kept) for prompt in asked.prompt]
    params = []
    for prompt in prompts:
        new = service.room(len(prompt.ids), asked.max_tokens, _DEFAULT_TOKENS, "prompt")
        params += sampling(service, asked, prompt, new, "max_tokens", asked.logprobs or 0)
    run = service.submit(request.scope["owner"], prompts, params, asked.n, kept)
    return await reply(service, request, _Answer(service, asked, run), asked.stream)


class _Answer(OpenAIAnswer):
    """One completion, whole or as chunks."""

    def __init__(self, service: Service, asked: CompletionRequest, run: Run) -> None:
        self.service, self.asked, self.run = service, asked, run
        self.count = len(run.ticket.jobs)
        self.offsets = [0] * self.count
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    async def _echo(self, index: int) -> str:
        """What the answer of a job begins with."""
        prompt = self.asked.prompt[index // self.asked.n]
        if not self.asked.echo:
            return ""
        return prompt if isinstance(prompt, str) else await self.service.aside(lambda t: t.decode(prompt))

    def _logprobs(self, index: int, token_event: TokenEvent) -> dict[str, list[Any]] | None:
        if self.asked.logprobs is None:
            return None
        tokens = self.service.tokens
        if not tokens.is_shown(token_event, self.asked.stop_token_ids):
            return _no_logprobs()
        assert token_event.token is not None, "is_shown says so"
        text, place = tokens.text(token_event.token), self.offsets[index]
        self.offsets[index] += len(text)
        return {
            "tokens": [text],
            "token_logprobs": [token_event.logprob],
            "top_logprobs": [{tokens.text(t): logprob for t, logprob in token_event.top}],
            "text_offset": [place],
        }

    async def whole(self) -> dict[str, Any]:
        texts = [await self._echo(i) for i in range(self.count)]
        logprobs = [_no_logprobs() for _ in range(self.count)]
        finish = [""] * self.count
        async for piece in self.service.pieces(self.run):
            if piece is None:
                continue
            texts[piece.index] += piece.text
            for name, values in (self._logprobs(piece.index, piece.event) or {}).items():
                logprobs[piece.index][name] += values
            if piece.completion is not None:
                finish[piece.index] = openai_finish(piece.completion.finish_reason)
        with_logprobs = self.asked.logprobs is not None
        choices = [
            {
                "index": i,
                "text": texts[i],
                "logprobs": logprobs[i] if with_logprobs else None,
                "finish_reason": finish[i],
            }
            for i in range(self.count)
        ]
        return {**self.head, "choices": choices, "usage": self.run.usage.openai()}

    async def events(self) -> AsyncIterator[bytes]:
        wants_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        extra = {"usage": None} if wants_usage else {}
        for i in range(self.count):
            echo = await self._echo(i)
            if echo:
                yield event(self.head | extra | {"choices": [_choice(i, echo)]})
        async for piece in self.service.pieces(self.run):
            if piece is None:
                yield COMMENT
                continue
            logprobs = self._logprobs(piece.index, piece.event)
            if piece.text or (logprobs and logprobs["tokens"]) or piece.completion is not None:
                done = piece.completion
                finish = None if done is None else openai_finish(done.finish_reason)
                choice = _choice(piece.index, piece.text, logprobs, finish)
                yield event(self.head | extra | {"choices": [choice]})
        if wants_usage:
            yield event({**self.head, "choices": [], "usage": self.run.usage.openai()})
        yield DONE


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _choice(index: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
