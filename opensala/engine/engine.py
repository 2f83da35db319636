"""The engine: sequences come, are computed together step by step, say what they got, and leave.

`Engine.add` takes a request, `Engine.step` computes one step for all of them and returns what there is to
say, `Engine.abort` ends one. It prints nothing, draws no bar and seeds nothing global. What a request gets
does not
depend on the others: on a CPU in float32, bit for bit.
"""

import itertools
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any, Protocol

import torch

from ..cache import Pool
from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.storage import CacheStorage, cache_sizes
from ..model.tiers import Allocate, Tiers
from .choosing import ActiveRequest, Chooser, Outcome
from .detokenize import Detokenizer
from .grammar import Grammars
from .options import EngineOptions, frames_on_gpu, kept_dtype, pool_sizes, snapshot_interval
from .request import (
    Completion,
    FinishReason,
    SamplingParams,
    Sequence,
    Status,
    TokenEvent,
    as_token_ids,
)
from .runner import Runner
from .sampler import Choice
from .scheduler import Limits, Scheduler, Work
from .selection import note_selection
from .speculate import Drafter


class KeptPrefixes(Protocol):
    """Beginnings of texts that outlive the engine (see `opensala.contexts.prefixes`)."""

    def bring(self, engine: "Engine", tokens: array, sparse: bool, namespace: str) -> None:
        """Put the longest beginning of `tokens` at hand that is kept, if the engine lacks it. What cannot be
        had (damaged, too little memory) is left for the engine to read anew."""


class Engine:
    """A model with the memory of its sequences.

    Args:
        model: a MiniCPM-SALA model; it is put into evaluation mode.
        tokenizer: of transformers, for texts; None for token ids only.
        options: bounds.
        allocate: makes the memory of the device tier (shape, dtype), if it is not to be the GPU's.
        name: what to call the model in messages.

    Raises:
        ValueError: there is not even memory for one page and the states of one sequence.
    """

    def __init__(
        self,
        model: MiniCPMSALAForCausalLM,
        tokenizer: Any = None,
        options: EngineOptions | None = None,
        *,
        allocate: Allocate | None = None,
        name: str = "model",
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.options = options or EngineOptions()
        self.config: MiniCPMSALAConfig = model.config
        self.config.check()
        self.device, self.dtype = model.device, model.compute_dtype
        self.kv_dtype = kept_dtype(self.options.kv_dtype, self.dtype)
        if self.kv_dtype is not None and self.device.type != "cpu":
            raise ValueError(
                f"kv_dtype {self.options.kv_dtype} runs on a CPU only, and this model is on {self.device}: "
                "use kv_dtype auto"
            )
        self.sizes = cache_sizes(self.config, self.dtype, self.kv_dtype)
        if self.options.device_memory is not None and allocate is None:
            allocate = frames_on_gpu(model)
        pages, slots = pool_sizes(self.options, self.config, self.device, self.dtype)
        page_size = self.config.block_spec.block_size
        self.storage = CacheStorage(
            self.config,
            pages,
            slots,
            self.dtype,
            model.model.layer_devices(),
            kv_dtype=self.kv_dtype,
            kv_device=None if self.options.device_memory is None else torch.device("cpu"),
            scratch=True,
        )
        interval = self.options.snapshot_interval
        limits = Limits(
            max_batch_tokens=self.options.max_batch_tokens,
            max_running=self.options.max_running,
            snapshot_interval=snapshot_interval(self.config, self.sizes) if interval is None else interval,
            min_shared=self.options.min_shared,
        )
        self.scheduler = Scheduler(Pool(pages, "pages"), Pool(slots, "state slots"), page_size, limits)
        self.runner = Runner(model, self.storage)
        self.end_ids = _end_ids(model)
        self.grammars = Grammars(tokenizer, self.config.vocab_size, self.end_ids)
        self.prefixes: KeptPrefixes | None = None  # asked for each prompt
        self.last_read = 0  # tokens of prompts that the last step computed
        self._requests: dict[str, ActiveRequest] = {}
        self._text_lengths: dict[bool, dict[int, int]] = {False: {}, True: {}}  # see Detokenizer
        self.chooser = Chooser(self.runner, self._requests, self.end_ids)
        self._numbers = itertools.count()
        if self.options.host_memory is not None or self.options.device_memory is not None:
            self.tiers(allocate).budget = self.options.host_memory

    def tiers(self, allocate: Allocate | None = None) -> Tiers:
        """Where its keys and values lie; made at the first call."""
        if not isinstance(self.storage.backing, Tiers):
            most = self.options.max_running
            found = Tiers(self.storage, most, self.options.device_memory, allocate)
            self.storage.backing = found
            self.scheduler.pages.freed = found.forget
        return self.storage.backing

    # --- requests ---

    @property
    def capacity(self) -> int:
        """Tokens, prompt and answer, that one request can have."""
        return (self.scheduler.pages.size - 1) * self.config.block_spec.block_size

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt."""
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer: give token ids")
        return self.tokenizer(text)["input_ids"]

    def check_prompt(self, tokens: int, new_tokens: int) -> list[str]:
        """Refuse a prompt that memory cannot hold; return remarks the user should see.

        Raises:
            ValueError: with what is needed, what there is, and what to change.
        """
        total = tokens + new_tokens
        if total > self.capacity:
            page = self.sizes.page
            needed = (-(-total // self.config.block_spec.block_size) + 1) * page
            answer = f" and an answer of up to {new_tokens:,} need" if new_tokens else " needs"
            raise ValueError(
                f"a prompt of {tokens:,} tokens{answer} {needed:,} bytes of cache on {self.device.type}, the "
                f"engine has {self.scheduler.pages.size * page:,} ({self.capacity:,} tokens): shorten the "
                "document, free memory, or use a smaller dtype"
            )
        if self.storage.backing is not None:
            self.storage.backing.check_prompt(total)
        limit = self.config.max_position_embeddings
        if total > limit:
            return [f"the prompt and its answer take {total:,} tokens; the model was made for {limit:,}"]
        return []

    def _check_room(self, ids: array, new_tokens: int, namespace: str) -> None:
        if not self.scheduler.holds:
            return
        room = self.scheduler.holds.room(ids, self.config.attends_sparsely(len(ids)), namespace)
        if len(ids) + new_tokens > room:
            raise ValueError(
                f"a prompt of {len(ids):,} tokens and an answer of up to {new_tokens:,} do not fit beside "
                f"the open contexts, which leave room for {room:,}: close a context, or give the engine "
                "more memory"
            )

    def add(
        self,
        prompt: SequenceOf[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        marks: SequenceOf[int] = (),
        namespace: str = "",
    ) -> str:
        """Take a request; its tokens come with later steps.

        Args:
            prompt: token ids.
            params: how to continue it; greedily by default.
            request_id: its name; a number by default.
            marks: places in the prompt (ends of documents or turns) from which later prompts may continue.
            namespace: only requests of the same one share what was read.

        Returns:
            The request's id.

        Raises:
            ValueError: an empty prompt, unknown token ids, a prompt longer than the memory, an id in use,
                marks outside the prompt, stop texts without a tokenizer, a place to score from that is not in
                the prompt, a grammar that cannot be enforced.
        """
        params = params or SamplingParams()
        ids = as_token_ids(prompt, self.config.vocab_size)
        request_id = f"request-{next(self._numbers)}" if request_id is None else request_id
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is in use: give each request its own")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer; use stop_token_ids")
        if params.logprobs > self.config.vocab_size:
            raise ValueError(
                f"logprobs must be at most {self.config.vocab_size} (the vocabulary), got {params.logprobs}"
            )
        wrong = [m for m in marks if not 0 < m <= len(ids)]
        if wrong:
            raise ValueError(f"marks must lie within the prompt, 1 to {len(ids)}, got {wrong[0]}")
        targets = array("i")
        if params.score_from is not None:
            if params.score_from >= len(ids):
                raise ValueError(
                    f"score_from must be below the prompt's {len(ids)} tokens, got {params.score_from}"
                )
            if params.max_tokens:
                raise ValueError(
                    "a request either scores its prompt (max_tokens=0) or continues it, not both"
                )
            targets, ids = ids[1:], ids[:-1]  # the last token is only predicted
        self.check_prompt(len(ids), params.max_tokens)
        self._check_room(ids, params.max_tokens, namespace)
        sequence = Sequence(
            request_id, ids, len(ids), params, self.config.attention_rule, next(self._numbers), namespace
        )
        sequence.marks = sorted({m for m in marks if m <= len(ids)})
        drafts = self.options.speculate if params.speculate is None else params.speculate
        self._requests[request_id] = ActiveRequest(
            sequence,
            Detokenizer(
                self.tokenizer, params.stop, params.keep_special, self._text_lengths[params.keep_special]
            ),
            Completion(request_id),
            None if params.is_greedy else _generator(params.seed),
            Drafter(drafts) if drafts and params.max_tokens else None,
            targets,
            None if params.grammar is None else self.grammars.guide(params.grammar),
        )
        if self.prefixes is not None:
            wanted = sequence.tokens[: self.scheduler.wanted_length(sequence)]
            self.prefixes.bring(self, wanted, sequence.is_sparse(0), namespace)
        self.scheduler.add(sequence)
        self.runner.native.look_again()
        return request_id

    def abort(self, request_id: str) -> TokenEvent:
        """End a request now; its memory is free at once.

        Raises:
            ValueError: no such request is running or waiting.
        """
        request = self._requests.get(request_id)
        if request is None:
            raise ValueError(f"no request {request_id!r} is running or waiting: it ended, or it never was")
        return self._end(request, FinishReason.ABORT)

    def forget_prefixes(self) -> None:
        """Keep nothing of what was read for later prompts, and let the system have its main memory; what
        running requests and open contexts use stays theirs."""
        self.scheduler.tree.clear()
        self.storage.give_back(self.scheduler.pages.free, self.scheduler.slots.free)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def sequence(self, request_id: str) -> Sequence | None:
        """A request that is running or waiting, to look at between steps; None once it has ended."""
        request = self._requests.get(request_id)
        return None if request is None else request.sequence

    def tokens_read(self, request_id: str) -> int:
        """How many tokens of a request's prompt are at hand or read so far."""
        sequence = self._requests[request_id].sequence
        return min(sequence.num_cached, sequence.num_prompt)

    # --- a step ---

    def limit_reading(self, tokens: int | None) -> None:
        """Read at most so many tokens in each step that also decodes, from now on (see `last_read`); None for
        as many as `max_batch_tokens` leaves."""
        tokens = None if tokens is None else max(0, tokens)
        if tokens != self.scheduler.limits.max_read_tokens:
            self.scheduler.limits = replace(self.scheduler.limits, max_read_tokens=tokens)

    def step(self) -> list[TokenEvent]:
        """Compute one step for all requests; returns what there is to say, in the order of their arrival.

        An interruption (Ctrl-C, out of memory) leaves every request as it was before the step.
        """
        for request in self._requests.values():
            self._draft(request)
        step = self.scheduler.schedule()
        if not step.works:
            assert not self.has_work, "a sequence that is alone always fits"
            return []
        self.last_read = sum(work.count for work in step.works if work.reads)
        try:
            hidden = self.runner.run(step)
            found = list(zip(step.works, self.chooser.choose(step, hidden), strict=True))
            rewound = [(work, outcome.kept) for work, outcome in found if outcome.kept < work.count]
            if rewound:
                self.runner.rewind(step, rewound)
            if any(work.sequence.params.selection for work in step.works):
                self._note_selection(found)
        except BaseException:
            self.scheduler.discard(step)
            raise
        return [event for work, outcome in found for event in self._apply(work, outcome)]

    def _note_selection(self, found: list[tuple[Work, Outcome]]) -> None:
        completions = {name: request.completion for name, request in self._requests.items()}
        note_selection(self.runner, [(work, outcome.choices) for work, outcome in found], completions)

    def _draft(self, request: ActiveRequest) -> None:
        sequence = request.sequence
        if request.drafter is None or sequence.status is not Status.RUNNING or sequence.num_pending != 1:
            return
        room = sequence.room - sequence.num_tokens - 1
        sequence.draft = request.drafter.propose(sequence.tokens, room) if room > 0 else []
        if request.guide is not None and sequence.draft:
            request.guide.rewind(sequence.num_tokens - sequence.num_prompt)
            del sequence.draft[request.guide.check(sequence.draft) :]

    def _apply(self, work: Work, outcome: Outcome) -> list[TokenEvent]:
        """Make a work's outcome part of its sequence."""
        sequence = work.sequence
        request = self._requests[sequence.request_id]
        if sequence.params.score_from is not None:  # a text that was put back is scored again
            del request.completion.scores[max(0, sequence.num_cached - sequence.params.score_from + 1) :]
            request.completion.scores += outcome.scores
        self.scheduler.commit(work, outcome.kept)
        if work.drafted and request.drafter is not None:
            taken = max(0, len(outcome.choices) - 1)
            request.drafter.learn(work.drafted, taken)
        sequence.draft = []
        events = []
        for choice in outcome.choices:
            sequence.tokens.append(choice.token)
            events.append(self._event(request, choice))
            if events[-1].finish_reason is not None:
                return events
        if outcome.error is not None:
            request.completion.by_request = outcome.by_request
            return [*events, self._end(request, FinishReason.ERROR, outcome.error)]
        if not sequence.params.max_tokens and not sequence.is_reading:
            events.append(self._end(request, FinishReason.LENGTH))
        return events

    def _event(self, request: ActiveRequest, choice: Choice) -> TokenEvent:
        """The event of one token; ends the request if the token does."""
        sequence, done = request.sequence, request.completion
        params = sequence.params
        done.tokens.append(choice.token)
        done.logprobs.append(choice.logprob)
        done.top.append(choice.top)
        reason, text = None, ""
        if choice.token in params.stop_token_ids or (choice.token in self.end_ids and not params.ignore_eos):
            reason = FinishReason.STOP
        else:
            text = request.detokenizer.add(choice.token)
            if request.detokenizer.stopped:
                reason = FinishReason.STOP
            elif len(done.tokens) >= params.max_tokens:
                reason = FinishReason.LENGTH
        completion = None
        if reason is not None:
            last = self._end(request, reason)
            text, completion = text + last.text, last.completion
        return TokenEvent(sequence.request_id, choice.token, text, choice.logprob, choice.top, completion)

    def _end(self, request: ActiveRequest, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """End a request: give its memory back and say the rest of its text."""
        sequence, done = request.sequence, request.completion
        self.scheduler.finish(sequence, reason)
        del self._requests[sequence.request_id]
        rest = request.detokenizer.finish()
        done.text, done.finish_reason, done.error = request.detokenizer.text, reason, error
        del done.selection[len(done.tokens) :]  # of drafts behind a stop text
        done.reuse, done.stop = sequence.reuse, request.detokenizer.stop
        if request.drafter is not None:
            done.drafted, done.accepted = request.drafter.proposed, request.drafter.accepted
        return TokenEvent(sequence.request_id, None, rest, completion=done)

    # --- for callers that wait ---

    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        marks: SequenceOf[SequenceOf[int]] | None = None,
        on_event: Callable[[TokenEvent], None] | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continue prompts, together, and wait for all of them.

        Args:
            prompts: token ids of each.
            params: one for all, or one each.
            marks: places of each prompt to keep for later prompts (see `add`).
            on_event: called with every event.
            on_read: called after each step with the number of prompt tokens that it read, or found at hand.

        Raises:
            ValueError: see `add`; a request of another caller is under way; a model's output is not finite.
        """
        if self._requests:
            raise ValueError(
                f"{len(self._requests)} other requests are under way: call step() for them first"
            )
        every = (
            [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        )
        places = marks or [()] * len(prompts)
        done: dict[str, Completion] = {}
        ids: list[str] = []
        try:
            for prompt, one, some in zip(prompts, every, places, strict=True):
                ids.append(self.add(prompt, one, marks=some))
            lengths = {i: self._requests[i].sequence.num_prompt for i in ids}
            read = 0
            while self.has_work:
                for event in self.step():
                    if event.completion is not None:
                        done[event.request_id] = event.completion
                    if on_event is not None:
                        on_event(event)
                at_hand = sum(lengths[i] if i in done else self.tokens_read(i) for i in ids)
                if on_read is not None and at_hand > read:
                    on_read(at_hand - read)
                read = max(read, at_hand)
        finally:
            for request_id in ids:
                if request_id in self._requests:  # an interruption, or a prompt that was refused
                    self.abort(request_id)
        for completion in done.values():
            if completion.error is not None:
                raise ValueError(completion.error)
        return [done[i] for i in ids]

    def stream(self, prompt: SequenceOf[int], params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Continue one prompt, event by event; ends the request if the caller stops listening."""
        request_id = self.add(prompt, params)
        try:
            while request_id in self._requests:
                yield from (event for event in self.step() if event.request_id == request_id)
        finally:
            if request_id in self._requests:
                self.abort(request_id)

    def check_integrity(self) -> None:
        """Assert that every page and slot belongs to exactly those that say so."""
        self.scheduler.check_integrity()
        assert {s.request_id for s in self.scheduler.sequences()} == set(self._requests), (
            "requests went astray"
        )


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _end_ids(model: MiniCPMSALAForCausalLM) -> frozenset[int]:
    """Tokens at which a text ends: those of the generation config, as for transformers, else of the
    config."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = model.config.eos_token_id if ends is None else ends
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
