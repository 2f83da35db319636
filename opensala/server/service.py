"""What the routes of all APIs stand on: a model's engine, its limits, and the way of a request through it."""

import asyncio
import contextlib
import copy
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..contexts import DamagedContext
from ..contexts.kept import Kept, identity
from ..contexts.prefixes import PrefixFolder
from ..contexts.shelf import Shelf
from ..engine import Completion, Engine, Grammar, SamplingParams
from ..engine.calls import CallReader
from ..engine.chat import ChatPrompt, Message, encode_chat
from ..engine.tools import CallForm, Tool
from .encoders import Encoders
from .errors import ApiError, bad_request, from_value_error, shutting_down, too_slow
from .idle import release_when_idle
from .keeping import Keeper
from .keys import KeyFile
from .limits import Gate, ServerOptions
from .loop import Closed, EngineLoop, Job, Ticket
from .metrics import Metrics
from .output import Piece, TextReader, TokenTexts, Usage
from .pdfs import PdfReader
from .selections import Selections
from .tools import Shape, ToolUse

T = TypeVar("T")
_log = logging.getLogger("opensala.server")


@dataclass
class Run:
    """A request under way: its jobs, and what they cost so far.

    Attributes:
        readers: one for each job.
        has_tools: whether its answers may call tools.
        counted: jobs whose account of the prompt counts; the other ones have a prompt in common with these.
    """

    ticket: Ticket
    readers: Sequence[TextReader | CallReader]
    counted: Collection[int]
    usage: Usage
    has_tools: bool = False
    started: float = field(default_factory=time.monotonic)


class Service:
    """A model that is served.

    Args:
        engine: with a tokenizer; it belongs to the service from `start` to `close`.
        name: what clients call the model.
        options: limits.
        keys: who may use it; None for anybody who can connect.
        contexts: the folder of kept contexts; None to keep none.
        prefixes: where beginnings of texts outlive the engine; closed with the service.

    Raises:
        ValueError: an engine without a tokenizer; a folder that cannot be written.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        options: ServerOptions | None = None,
        keys: KeyFile | None = None,
        contexts: str | Path | None = None,
        prefixes: PrefixFolder | None = None,
    ) -> None:
        if engine.tokenizer is None:
            raise ValueError("a server needs an engine with a tokenizer")
        self.engine, self.name, self.keys = engine, name, keys
        self.options = options or ServerOptions()
        self.loop = EngineLoop(engine, self.options.stall, prefixes)
        self.gate = Gate(self.options)
        self.metrics = Metrics(lambda: self.loop.stats)
        self.created = int(time.time())
        described = engine.config.to_json_string(use_diff=False)
        described += f"{engine.dtype} {engine.storage.kv_dtype}"
        self.fingerprint = f"fp_{hashlib.sha256(described.encode()).hexdigest()[:10]}"
        self.context = min(engine.capacity, engine.config.max_position_embeddings)
        self._encoders = Encoders(engine.tokenizer)  # the engine's own is used in its thread
        self.tokens = TokenTexts(copy.deepcopy(engine.tokenizer), engine.end_ids)
        self.pdfs = PdfReader()
        self.temperature, self.top_p = _defaults(engine)
        self.selections = Selections(engine)
        self._form: CallForm | None = None  # how the model calls tools, once somebody asked
        self.keeper = None if contexts is None else Keeper(self, Shelf(contexts), identity(engine))
        self.closing = False  # nothing is begun any more
        self._idle: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.loop.start()
        self._idle = asyncio.get_running_loop().create_task(self._rest())
        if self.keeper is not None:
            self.keeper.start()

    async def _rest(self) -> None:
        with contextlib.suppress(Closed):  # the engine failed; requests say so
            await release_when_idle(
                self.gate, lambda: self.loop.num_open > 0, self.loop.forget, self.options.forget_seconds
            )

    async def close(self) -> None:
        """End what is under way, after the grace that the options give it."""
        self.closing = True
        self.pdfs.close()
        if self._idle is not None:
            self._idle.cancel()
        if self.keeper is not None:
            await self.keeper.settle(self.options.grace_seconds)
        await self.loop.close(self.options.grace_seconds)
        if self.keeper is not None:
            await self.keeper.close()
        self._encoders.close()

    # --- the way of a request ---

    def check_model(self, name: str) -> None:
        if name != self.name:
            shown = name if len(name) <= 100 else name[:97] + "..."
            raise ApiError(
                404,
                f"The model {shown!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def contexts(self) -> Keeper:
        """What keeps contexts.

        Raises:
            ApiError: 404, this server keeps none.
        """
        if self.keeper is None:
            raise ApiError(
                404,
                "this server keeps no contexts: start it with opensala serve --contexts DIR",
                code="contexts_disabled",
            )
        return self.keeper

    async def kept(self, owner: str, context_id: str | None) -> Kept | None:
        """The context that a request names, of the key that asks.

        Raises:
            ApiError: see `contexts` and `Keeper.open`.
        """
        return None if context_id is None else (await self.contexts().open(owner, context_id))[1]

    async def aside(self, work: Callable[[Any], T], about: Kept | None = None) -> T:
        """Run `work(tokenizer)` beside the event loop; its refusals are the caller's fault.

        Args:
            about: a context that it reads.

        Raises:
            ApiError: 400; 404, the context was removed meanwhile; 500, it is damaged; 503, the end.
        """
        try:
            return await self._encoders.run(work)
        except DamagedContext as error:  # it names a path, which is no business of the caller's
            if about is not None and self.keeper is not None and not self.keeper.shelf.has(about.name):
                raise self.keeper.missing(about.name) from None
            _log.error("a context could not be read: %s", error)
            raise ApiError(
                500, "the context could not be read; the server's log says why", code="context_failed"
            ) from None
        except ValueError as error:
            raise from_value_error(error, {}) from None

    async def chat(
        self,
        messages: Sequence[Message],
        continue_final: bool = False,
        kept: Kept | None = None,
        tools: Sequence[Tool] = (),
    ) -> ChatPrompt:
        """The prompt of a conversation, about a context if one is given."""
        how: dict[str, Any] = {"continue_final": continue_final, "stable": self.options.stable_prefix}
        how |= {"tools": tools}
        return await self.aside(
            lambda t: encode_chat(t, messages, **how) if kept is None else kept.chat(t, messages, **how),
            about=kept,
        )

    async def shape(self, use: ToolUse, grammar: Grammar | None, field: str) -> Shape:
        """What an answer may look like; what cannot be enforced is refused before it begins.

        Args:
            use: tools.
            grammar: the form that is asked for beside them.
            field: the request's name of that form.

        Raises:
            ApiError: 400.
        """
        if use.tools and grammar is not None:
            raise bad_request(
                f"Unsupported: '{field}' together with 'tools'; give one of them",
                field,
                "unsupported_parameter",
            )

        def work(tokenizer: Any) -> Shape:
            self._form = self._form or (CallForm.of(tokenizer) if use.tools else None)
            form, literal = self._form if use.tools else None, self.engine.grammars.literal
            found = Shape(use, form, grammar, literal, tokenizer.all_special_tokens)
            if found.grammar is not None:
                self.engine.grammars.compile(found.grammar)
            return found

        try:
            return await self.aside(work)
        except ApiError as error:
            if error.status != 400:
                raise
            param = "tools" if use.tools else field
            text = f"Invalid '{param}': {error.message}"
            raise bad_request(text, param, "unsupported_parameter") from None

    async def raw(self, prompt: str | list[int], kept: Kept | None = None) -> ChatPrompt:
        """A prompt that is taken as it is, right behind the documents of a context if one is given."""
        if kept is not None:
            if not isinstance(prompt, str):
                raise bad_request("Invalid 'prompt': with 'context' it must be text, not token ids", "prompt")
            text = prompt
            return await self.aside(lambda t: kept.raw(t, text), about=kept)
        ids = await self.aside(lambda t: t(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        return ChatPrompt(ids, (), (), False)

    def room(self, prompt: int, asked: int | None, default: int, param: str) -> int:
        """How many tokens to generate.

        Raises:
            ApiError: 400, the prompt or the answer asked for are too long.
        """
        most = self.options.max_prompt_tokens
        if most is not None and prompt > most:
            raise bad_request(
                f"The prompt has {prompt:,} tokens, this server reads {most:,}",
                param,
                "context_length_exceeded",
            )
        if asked is not None and asked > self.options.max_new_tokens:
            raise bad_request(
                f"Invalid '{param}': at most {self.options.max_new_tokens:,} are generated, got {asked:,}",
                param,
                "invalid_value",
            )
        if prompt + (asked or 1) > self.context:
            raise bad_request(
                f"This model's maximum context length is {self.context:,} tokens. However, you requested "
                f"{prompt + (asked or 1):,} tokens ({prompt:,} in the prompt, {asked or 1:,} in the answer)",
                param,
                "context_length_exceeded",
            )
        return asked or min(default, self.options.max_new_tokens, self.context - prompt)

    def params(self, fields: dict[str, str], **given: Any) -> SamplingParams:
        """Sampling parameters; what was not given is as the checkpoint's generation config has it.

        Args:
            fields: the request's names of parameters that have another name there.
            given: as the request has them; `shape` is what its answer may look like.

        Raises:
            ApiError: 400.
        """
        temperature, top_p = given.pop("temperature"), given.pop("top_p")
        shape: Shape | None = given.pop("shape", None)
        if shape is not None:
            given |= {"grammar": shape.grammar, "keep_special": shape.keep_special}
            given["stop"] = (*given["stop"], *shape.stop)
        temperature = self.temperature if temperature is None else temperature
        top_p = self.top_p if top_p is None else top_p
        if top_p == 0:  # the most likely token alone
            temperature, top_p = 0.0, 1.0
        try:
            return SamplingParams(temperature=temperature, top_p=top_p, **given)
        except ValueError as error:
            names = {name: fields.get(name, name) for name in (*given, "temperature", "top_p")}
            raise from_value_error(error, names) from None

    def submit(
        self,
        owner: str,
        prompts: Sequence[ChatPrompt],
        params: Sequence[SamplingParams],
        count: int = 1,
        kept: Kept | None = None,
        shape: Shape | None = None,
    ) -> Run:
        """Hand prompts to the engine, `count` times each.

        Args:
            params: of each choice, those of the first prompt first.
            kept: what the prompts are about; it is put at hand for them.
            shape: of the answers.

        Raises:
            ApiError: the engine cannot take them (400), or takes nothing any more (503).
        """
        every = [prompt for prompt in prompts for _ in range(count)]
        jobs = [Job(p.ids, one, p.marks, kept) for p, one in zip(every, params, strict=True)]
        try:
            ticket = self.loop.submit(owner, jobs)
        except ValueError as error:
            raise from_value_error(error, {}) from None
        except Closed as error:
            raise shutting_down(str(error)) from None
        usage = Usage(prompt=sum(len(p.ids) for p in prompts))
        form = None if shape is None else shape.form
        if form is None or shape is None:
            readers = [TextReader(p.trims) for p in every]
            return Run(ticket, readers, range(0, len(jobs), count), usage)
        names, most = {tool.name for tool in shape.use.tools}, None if shape.use.parallel else 1
        calls = [CallReader(form, names, most) for _ in every]
        return Run(ticket, calls, range(0, len(jobs), count), usage, has_tools=True)

    async def pieces(self, run: Run, every: float | None = None) -> AsyncGenerator[Piece | None, None]:
        """What the jobs of a request have to say, as it comes; None where there was nothing to say for
        `every` seconds (by default the options' `ping_seconds`). Whoever stops listening ends the jobs.

        Raises:
            ApiError: the request took too long (504), or its engine failed (500, 503).
        """
        last: dict[int, float] = {}
        pending: asyncio.Future[Any] | None = None
        try:
            while run.ticket.is_open:
                pending = pending or asyncio.ensure_future(run.ticket.next())
                left = run.started + self.options.request_seconds - time.monotonic()
                await asyncio.wait({pending}, timeout=max(0.0, min(left, every or self.options.ping_seconds)))
                if not pending.done():
                    if left <= 0:
                        raise too_slow(self.options.request_seconds)
                    yield None
                    continue
                (index, event), pending = pending.result(), None
                self._measure(run, last, index, event.token is not None)
                if event.completion is not None:
                    _check(event.completion)
                    run.usage.add(event.completion)
                    if index in run.counted:
                        run.usage.account(event.completion)
                parts = run.readers[index].add(event.text, event.completion is not None)
                yield Piece(index, parts, event)
            self.metrics.prompt_tokens.inc(run.usage.prompt)
            self.metrics.cached_tokens.inc(run.usage.cached)
            self.metrics.restored_tokens.inc(run.usage.restored)
            self.metrics.restored_prompts.inc(run.usage.restored > 0)
        finally:
            run.ticket.cancel()
            if pending is not None:
                pending.cancel()

    def _measure(self, run: Run, last: dict[int, float], index: int, is_token: bool) -> None:
        if not is_token:
            return
        now = time.monotonic()
        self.metrics.new_tokens.inc()
        if index in last:
            self.metrics.between_tokens.observe(now - last[index])
        elif not last:
            self.metrics.first_token.observe(now - run.started)
        last[index] = now


def _check(done: Completion) -> None:
    error = done.error
    if error is None:
        return
    if done.by_request:
        raise bad_request(error, code="invalid_value")
    if "shutting down" in error:
        raise shutting_down(error)
    raise ApiError(500, error, code="engine_error")


def _defaults(engine: Engine) -> tuple[float, float]:
    """Temperature and top_p of the checkpoint's generation config: greedy unless it says `do_sample`."""
    config = engine.model.generation_config
    if config is None or not config.do_sample:
        return 0.0, 1.0
    temperature, top_p = config.temperature, config.top_p
    return 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
