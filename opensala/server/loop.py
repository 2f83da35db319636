"""The thread that owns an engine, and what asyncio sees of it.

One thread alone calls the engine. Callers in asyncio hand it jobs and get a ticket, from which the events of
their jobs come. Jobs wait here, in a queue that is fair to owners, until the engine has a place for them; an
owner is also the namespace within which prefixes are shared. It knows nothing of HTTP.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..contexts import DamagedContext
from ..contexts.kept import Kept
from ..contexts.prefixes import PrefixFolder
from ..engine import Completion, Engine, FinishReason, SamplingParams, TokenEvent
from ..engine.request import as_token_ids
from .fairness import FairQueue
from .pace import Pace

T = TypeVar("T")
_log = logging.getLogger("opensala.server")
_IDLE_SECONDS = 0.5  # without anything to do, before what was read is kept


class Closed(RuntimeError):
    """The loop takes no more jobs: it is being closed, or its engine failed."""


@dataclass(frozen=True)
class Job:
    """One prompt to continue. `marks` are places in it from which later prompts may continue; `source` is
    what it begins with."""

    prompt: Sequence[int]
    params: SamplingParams
    marks: tuple[int, ...] = ()
    source: Kept | None = None


@dataclass(frozen=True)
class LoopStats:
    """What the engine holds, as of its last step; `kept` is what its prefix tree has on disk."""

    waiting: int = 0
    running: int = 0
    pages: int = 0
    pages_free: int = 0
    slots: int = 0
    slots_free: int = 0
    snapshots: int = 0
    steps: int = 0
    kept_texts: int = 0
    kept_bytes: int = 0
    tiers: dict[str, int] | None = None  # what moved between tiers of memory, if keys and values have several


class Ticket:
    """The jobs of one caller. Iterate over it for `(number of the job, event)`, to the last event of all.

    Attributes:
        read: tokens of the first job's prompt that are at hand so far.
    """

    def __init__(self, owner: str, jobs: Sequence[Job], cancel: Callable[["Ticket"], None]) -> None:
        self.owner, self.jobs, self.read = owner, list(jobs), 0
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        self._open, self._cancel = len(self.jobs), cancel

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        while self._open:
            yield await self.next()

    async def next(self) -> tuple[int, TokenEvent]:
        """The next event; only while `is_open`."""
        index, event = await self._queue.get()
        if event.completion is not None:
            self._open -= 1
        return index, event

    @property
    def is_open(self) -> bool:
        """Whether events are still to come."""
        return self._open > 0

    async def completions(self) -> list[Completion]:
        """Wait for all jobs."""
        done: dict[int, Completion] = {}
        async for index, event in self:
            if event.completion is not None:
                done[index] = event.completion
        return [done[i] for i in range(len(self.jobs))]

    def cancel(self) -> None:
        """End what is not ended; its memory is free after the step under way. Twice is no harm."""
        if self._open:
            self._cancel(self)

    def put(self, index: int, event: TokenEvent) -> None:
        self._queue.put_nowait((index, event))


class EngineLoop:
    """Runs an engine in a thread of its own.

    Args:
        engine: nobody else may use it from `start` to `close`.
        stall: see `Pace`.
        prefixes: where beginnings of texts outlive the engine; closed with the loop. None for nowhere.
    """

    def __init__(self, engine: Engine, stall: float = 2.5, prefixes: PrefixFolder | None = None) -> None:
        self.engine, self.prefixes = engine, prefixes
        engine.prefixes = prefixes
        self.pace = Pace(stall, engine.options.max_batch_tokens)
        self.stats = LoopStats()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: FairQueue[tuple[Ticket, int]] = FairQueue()
        self._running: dict[str, tuple[Ticket, int]] = {}
        self._reading: set[str] = set()
        self._outbox: list[tuple[Ticket, int, TokenEvent]] = []
        self._numbers, self._steps = itertools.count(), 0
        self._closing: str | None = None  # why no more jobs are taken
        self._door = threading.Lock()  # no job comes in between the last look at the inbox and the end
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._note_stats()

    # --- called from asyncio ---

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._closing is None

    def check(self, job: Job) -> None:
        """Refuse what the engine would refuse, before anything is promised.

        Raises:
            ValueError: see `Engine.add`.
        """
        ids = as_token_ids(job.prompt, self.engine.config.vocab_size)
        if job.params.logprobs > self.engine.config.vocab_size:
            raise ValueError(f"logprobs must be at most {self.engine.config.vocab_size} (the vocabulary)")
        self.engine.check_prompt(len(ids), job.params.max_tokens)

    def submit(self, owner: str, jobs: Sequence[Job]) -> Ticket:
        """Take jobs. Call it in the event loop that reads the ticket.

        Raises:
            ValueError: see `check`.
            Closed: no more jobs are taken.
        """
        for job in jobs:
            self.check(job)
        ticket = Ticket(owner, jobs, lambda t: self._inbox.put(lambda: self._end(t)))
        with self._door:
            if self._closing is not None or not self._thread.is_alive():
                raise Closed(self._closing or "the engine is not running")
            self._inbox.put(lambda: self._enqueue(ticket))
        return ticket

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Run `work` in the engine's thread between two steps; it should be short, for streams wait for it.

        Raises:
            Closed: the engine is not running any more.
            Exception: what `work` raised.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: Exception | None) -> None:
            if result.done():  # whoever asked was cancelled
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)  # type: ignore[arg-type]  # without an error there is a value

        def run() -> None:
            value, failure = None, None
            try:
                value = work(self.engine)
            except Exception as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(settle, value, failure)

        with self._door:
            if not self._thread.is_alive() or self._stop:
                raise Closed(self._closing or "the engine is not running")
            self._inbox.put(run)
        return await result

    async def forget(self) -> None:
        """Keep nothing of what was read, but on disk, and let the system have its memory.

        Raises:
            Closed: the engine is not running any more.
        """
        await self.call(self._forget)

    async def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, let those under way go on for `grace` seconds, end the others with an error that
        says so, and stop the thread."""
        self._closing = self._closing or "the server is shutting down"
        if not self._thread.is_alive():
            return
        until = time.monotonic() + grace
        while self._thread.is_alive() and self.num_open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._inbox.put(self._finish)
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # what the thread sent last is handed out

    @property
    def num_open(self) -> int:
        """Jobs that wait or run."""
        return len(self._waiting) + len(self._running) + self._inbox.qsize()

    # --- in the thread ---

    def _run(self) -> None:
        why = "the engine failed; the server's log says how"
        try:
            while not self._stop:
                self._take_commands()
                self._admit()
                if self.engine.has_work:
                    self._step()
                self._note_stats()
                self._deliver()
            why = "the server is shutting down"
        finally:  # also if the thread dies: nobody may wait for ever
            with self._door:
                self._closing, self._stop = why, True
            while not self._inbox.empty():
                self._inbox.get()()
            self._end_all(why)
            self._note_stats()
            self._deliver()
            if self.prefixes is not None:
                self.prefixes.close()

    def _take_commands(self) -> None:
        """Do what callers asked for; wait for them if there is nothing else to do."""
        if not self.engine.has_work and not len(self._waiting):
            self._next_command()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _next_command(self) -> Callable[[], None]:
        """Wait for a command; what was read is kept meanwhile, piece by piece."""
        while self.prefixes is not None:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=_IDLE_SECONDS)
            if not self.prefixes.write_next():
                break
            self._note_stats()
        return self._inbox.get()

    def _forget(self, engine: Engine) -> None:
        while self.prefixes is not None and self.prefixes.write_next():
            pass
        engine.forget_prefixes()

    def _enqueue(self, ticket: Ticket) -> None:
        for index in range(len(ticket.jobs)):
            self._waiting.push(ticket.owner, (ticket, index))

    def _finish(self) -> None:
        self._stop = True

    def _admit(self) -> None:
        """Fill the engine's places from the queue. No more than that: what waits there is served in the order
        of arrival, not in turn."""
        while len(self._waiting) and self.engine.num_requests < self.engine.options.max_running:
            ticket, index = self._waiting.pop()
            job, request_id = ticket.jobs[index], f"job-{next(self._numbers)}"
            try:
                if job.source is not None:
                    job.source.bring(self.engine, job.prompt, ticket.owner)
                self.engine.add(
                    job.prompt, job.params, request_id=request_id, marks=job.marks, namespace=ticket.owner
                )
            except ValueError as error:  # `check` let it pass; it is still the caller's
                self._say_end(ticket, index, FinishReason.ERROR, str(error))
                continue
            self._running[request_id] = (ticket, index)
            self._reading.add(request_id)

    def _step(self) -> None:
        decoding, reading = self._load()
        self.engine.limit_reading(self.pace.limit(decoding, reading))
        began = time.perf_counter()
        try:
            events = self.engine.step()
        except (RuntimeError, MemoryError, DamagedContext) as error:  # out of memory on a device is the first
            _log.exception("a step failed; the requests in it end")
            sources = [t.jobs[index].source for t, index in self._running.values()]
            self._end_running(f"the engine failed: {type(error).__name__}")
            if isinstance(error, DamagedContext):  # nothing of it may be used again
                self.engine.forget_prefixes()
                for source in filter(None, sources):
                    source.distrusted = True
            return
        self.pace.note(decoding, reading, self.engine.last_read, time.perf_counter() - began)
        self._steps += 1
        for event in events:
            ticket, index = self._running[event.request_id]
            self._outbox.append((ticket, index, event))
            self._reading.discard(event.request_id)
            if event.completion is not None:
                del self._running[event.request_id]
        for request_id in self._reading:
            ticket, index = self._running[request_id]
            if index == 0:
                ticket.read = self.engine.tokens_read(request_id)

    def _load(self) -> tuple[int, bool]:
        """Sequences that the next step decodes, and whether there are prompts to read too."""
        scheduler = self.engine.scheduler
        decoding = sum(sequence.num_pending == 1 for sequence in scheduler.running)
        return decoding, decoding < len(scheduler.running) or len(scheduler.waiting) > 0

    def _end(self, ticket: Ticket) -> None:
        """Abort the jobs of a ticket."""
        for _, index in self._waiting.remove(lambda entry: entry[0] is ticket):
            self._say_end(ticket, index, FinishReason.ABORT)
        for request_id in [r for r, (t, _) in self._running.items() if t is ticket]:
            self._abort(request_id)

    def _end_running(self, error: str) -> None:
        for request_id in list(self._running):
            self._abort(request_id, error)

    def _end_all(self, error: str) -> None:
        self._end_running(error)
        for ticket, index in self._waiting.remove(lambda entry: True):
            self._say_end(ticket, index, FinishReason.ERROR, error)

    def _abort(self, request_id: str, error: str | None = None) -> None:
        ticket, index = self._running.pop(request_id)
        self._reading.discard(request_id)
        event = self.engine.abort(request_id)
        if error is not None and event.completion is not None:
            event.completion.finish_reason, event.completion.error = FinishReason.ERROR, error
        self._outbox.append((ticket, index, event))

    def _say_end(self, ticket: Ticket, index: int, reason: FinishReason, error: str | None = None) -> None:
        done = Completion("", finish_reason=reason, error=error)
        self._outbox.append((ticket, index, TokenEvent("", None, "", completion=done)))

    def _deliver(self) -> None:
        """Hand events over, one call into each event loop for all of them."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, int, TokenEvent]]] = {}
        for entry in self._outbox:
            batches.setdefault(entry[0].loop, []).append(entry)
        self._outbox = []
        for loop, batch in batches.items():
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_hand_out, batch)

    def _note_stats(self) -> None:
        scheduler = self.engine.scheduler
        self.stats = LoopStats(
            waiting=len(self._waiting) + len(scheduler.waiting),
            running=len(scheduler.running),
            pages=scheduler.pages.size,
            pages_free=scheduler.pages.num_free,
            slots=scheduler.slots.size,
            slots_free=scheduler.slots.num_free,
            snapshots=scheduler.tree.num_snapshots,
            steps=self._steps,
            kept_texts=0 if self.prefixes is None else self.prefixes.num_texts,
            kept_bytes=0 if self.prefixes is None else self.prefixes.num_bytes,
            tiers=None if self.engine.storage.backing is None else self.engine.tiers().stats(),
        )


def _hand_out(batch: list[tuple[Ticket, int, TokenEvent]]) -> None:
    for ticket, index, event in batch:
        ticket.put(index, event)
