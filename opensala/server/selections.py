"""Where a model looked: the blocks that its sparse layers selected for the tokens of an answer.

A chat completion with `selection: true` is watched, and what was selected is kept in memory for a while,
under the id of the completion, for the key that asked. It is compact (numbers of blocks), bounded, and gone
with the process. Blocks that are always selected (the first ones and those right before a token) are not
listed: their rule is told.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..contexts.kept import Kept
from ..contexts.passages import passage, places
from ..engine import Completion, Engine, Selection
from ..engine.detokenize import Detokenizer
from .errors import ApiError, bad_request
from .openai_schema import ChatRequest

if TYPE_CHECKING:
    from .service import Service

_ANSWER_BYTES = 4 << 20  # of one answer's block numbers; later tokens are not watched
_TOTAL_BYTES = 64 << 20
_PER_KEY = 32  # answers; the oldest give way
_SECONDS = 3600.0
_LONGEST_PASSAGE = 4096  # tokens


@dataclass(frozen=True)
class _Answer:
    """What is kept of an answer: its tokens, and what was selected for the first of them."""

    owner: str
    context: str
    created: float
    prompt_tokens: int
    document_tokens: int
    text: str
    tokens: list[int]
    selection: list[Selection]
    num_bytes: int


class Watch:
    """A completion under way whose selections are wanted.

    Attributes:
        limit: tokens of the answer that are watched at most.
    """

    def __init__(self, limit: int, keep: Callable[[str, Completion], None]) -> None:
        self.limit, self.keep = limit, keep


class Selections:
    """What was selected for answers, by their ids.

    Args:
        engine: whose layers and blocks they are; only its configuration is looked at.
        clock: seconds since 1970.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.config, self._clock = engine.config, clock
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self.layers, config = sorted(engine.storage.kv), engine.config
        assert config.num_key_value_heads, "filled by the configuration"
        per_token = 4 * max(1, len(self.layers)) * config.num_key_value_heads * config.block_spec.num_blocks
        self.limit = max(1, _ANSWER_BYTES // per_token)

    @property
    def num_bytes(self) -> int:
        return sum(answer.num_bytes for answer in self._answers.values())

    def watch(self, owner: str, asked: ChatRequest, prompt_tokens: int, kept: Kept | None) -> Watch | None:
        """What to tell the engine and to call at the end, if the request asks for it.

        Raises:
            ApiError: 400, it is not about a context, or asks for several answers.
        """
        if not asked.selection:
            return None
        context = asked.context
        if kept is None or context is None:
            raise bad_request(
                "Invalid 'selection': only with 'context', a context of this key",
                "selection",
                "invalid_value",
            )
        if asked.n != 1:
            raise bad_request(
                f"Invalid 'n': with 'selection' there is one answer, got {asked.n}", "n", "invalid_value"
            )

        def keep(answer_id: str, done: Completion) -> None:
            blocks = [b for chosen in done.selection for b in (chosen.blocks or {}).values()]
            size = 4 * len(done.tokens) + len(done.text) + sum(b.nbytes for b in blocks)
            now, document = self._clock(), len(kept.tokens)
            what = (done.text, done.tokens, done.selection)
            self._put(answer_id, _Answer(owner, context, now, prompt_tokens, document, *what, size))

        return Watch(self.limit, keep)

    def _put(self, answer_id: str, answer: _Answer) -> None:
        self._answers[answer_id] = answer
        mine = [name for name, one in self._answers.items() if one.owner == answer.owner]
        for name in mine[:-_PER_KEY]:
            del self._answers[name]
        self._expire()
        while self.num_bytes > _TOTAL_BYTES:
            self._answers.popitem(last=False)

    def _expire(self) -> None:
        since = self._clock() - _SECONDS
        for name in [name for name, one in self._answers.items() if one.created <= since]:
            del self._answers[name]

    def get(self, owner: str, answer_id: str) -> _Answer:
        """Raises ApiError (404) if there is none of this owner; that it is another's is not told."""
        self._expire()
        found = self._answers.get(answer_id)
        if found is None or found.owner != owner:
            raise ApiError(
                404,
                f"There is no selection {answer_id[:60]!r}: it is kept for {_SECONDS / 60:.0f} minutes after "
                "an answer that was asked for with selection=true",
                param="id",
                code="selection_not_found",
            )
        return found

    def shape(self, answer_id: str, answer: _Answer, tokenizer: Any) -> dict[str, Any]:
        """The answer's selections as clients see them."""
        spec = self.config.block_spec
        texts = _token_texts(tokenizer, answer.tokens, answer.text)
        watched = list(zip(texts, answer.selection, strict=False))
        return {
            "id": answer_id,
            "object": "selection",
            "context": answer.context,
            "created_at": int(answer.created),
            "expires_at": int(answer.created + _SECONDS),
            "prompt_tokens": answer.prompt_tokens,
            "document_tokens": answer.document_tokens,
            "block_size": spec.block_size,
            "layers": self.layers,
            "always": {"first_blocks": spec.init_blocks, "last_blocks": spec.window_blocks + 1},
            "tokens": [
                {"text": text, "position": chosen.position, "chosen": self._chosen(chosen)}
                for text, chosen in watched
            ],
            "truncated": len(watched) < len(texts),
        }

    def _chosen(self, chosen: Selection) -> list[list[list[int]]] | None:
        """Blocks by layer and kv head, without those that are always selected; None in dense mode."""
        if chosen.blocks is None:
            return None
        spec = self.config.block_spec
        low, high = spec.init_blocks, chosen.position // spec.block_size - spec.window_blocks
        layers: list[list[list[int]]] = []
        for layer in self.layers:
            heads: list[np.ndarray] = list(chosen.blocks[layer])
            layers.append([head[(head >= low) & (head < high)].tolist() for head in heads])
        return layers


def _token_texts(tokenizer: Any, tokens: list[int], text: str) -> list[str]:
    """What each token adds to the answer's text; tokens behind its end (a stop) are left out."""
    if not tokens:
        return []
    detokenizer = Detokenizer(tokenizer, ())
    parts = [detokenizer.add(token) for token in tokens]
    parts[-1] += detokenizer.finish()
    shown: list[str] = []
    place = 0
    for part in parts:
        if place >= len(text):
            break
        shown.append(text[place : place + len(part)])
        place += len(part)
    return shown


# --- routes ---


async def get_selection(service: "Service", request: Request) -> Response:
    """GET /v1/selections/{id}"""
    answer_id = request.path_params["id"]
    answer = service.selections.get(request.scope["owner"], answer_id)
    return JSONResponse(await service.aside(lambda t: service.selections.shape(answer_id, answer, t)))


async def get_text(service: "Service", request: Request) -> Response:
    """GET /v1/contexts/{id}/text"""
    start, end, around = (_number(request, name, least) for name, least in _RANGE)
    if end - start > _LONGEST_PASSAGE or around > _LONGEST_PASSAGE:
        raise bad_request(
            f"Invalid 'end': at most {_LONGEST_PASSAGE:,} tokens are sent at a time, and as many around them",
            "end",
            "invalid_value",
        )
    record, kept = await service.contexts().open(request.scope["owner"], request.path_params["id"])
    found = await service.aside(lambda t: passage(t, kept.tokens, start, end, around))
    span = {"id": record.id, "object": "context.text", "start": start, "end": end}
    return JSONResponse({**span, **found._asdict()})


async def get_documents(service: "Service", request: Request) -> Response:
    """GET /v1/contexts/{id}/documents"""
    record, kept = await service.contexts().open(request.scope["owner"], request.path_params["id"])
    found = await service.aside(lambda t: places(t, kept.tokens, kept.folder.texts()))
    return JSONResponse(
        {"id": record.id, "object": "context.documents", "data": [place._asdict() for place in found]}
    )


_RANGE = (("start", None), ("end", None), ("around", 0))


def _number(request: Request, name: str, default: int | None) -> int:
    """A whole number of the query.

    Raises:
        ApiError: 400, it is missing or something else.
    """
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 9:
        got = "nothing" if text is None else repr(text[:60])
        raise bad_request(
            f"Invalid '{name}': a whole number of tokens, from 0 on, got {got}", name, "invalid_value"
        )
    return int(text)


QUERIES = {
    "/v1/contexts/{id}/text": [
        {
            "name": name,
            "in": "query",
            "required": default is None,
            "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
        }
        for name, default in _RANGE
    ]
}
