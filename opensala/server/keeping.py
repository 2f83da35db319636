"""Contexts of clients: read once by the engine, kept on disk, named by their ids in later requests.

A context never changes: extending and forking make new ones, whose files are the same where the disk can
share them. Reading goes through the engine's loop like any long prompt; what was read is copied out between
steps, some pages at a time, and written in another thread.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..contexts.folder import ContextFolder
from ..contexts.kept import Draft, Kept
from ..contexts.shelf import Record, Shelf
from ..engine import Document, SamplingParams
from ..engine.chat import ChatPrompt
from .errors import ApiError, bad_request, shutting_down
from .loop import Closed

if TYPE_CHECKING:
    from .service import Service

T = TypeVar("T")
_log = logging.getLogger("opensala.server")
_READ = SamplingParams(max_tokens=1, ignore_eos=True, speculate=0)
_OPEN = 32  # contexts whose tokens stay in memory
_SWEEP_SECONDS = 30.0
_PROGRESS_SECONDS = 0.25
_TRIES = 3  # readings, where others take the memory before what was read is written


@dataclass(frozen=True)
class Wish:
    """What a client asks for: documents behind those of `base`, if it is given, and how long to keep them."""

    owner: str
    documents: list[Document]
    ttl: int | None
    pinned: bool
    base: tuple[Record, Kept] | None = None


@dataclass(frozen=True)
class Progress:
    """A context that is being read: its id, tokens read, and tokens in all."""

    id: str
    read: int
    tokens: int


class Keeper:
    """The kept contexts of a service; made with it, started and closed with the application.

    Args:
        service: whose they are.
        shelf: where they lie.
        identity: of the service's model.
    """

    def __init__(self, service: "Service", shelf: Shelf, identity: dict[str, Any]) -> None:
        self.service, self.shelf, self.identity = service, shelf, identity
        described = json.dumps(identity, sort_keys=True).encode()
        self.fingerprint = hashlib.sha256(described).hexdigest()[:32]
        self._open: OrderedDict[str, Kept] = OrderedDict()
        self._making: Counter[str] = Counter()  # of each owner: contexts under way
        self._reserved: Counter[str] = Counter()  # and their bytes
        self._writers: set[asyncio.Task[Any]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def settle(self, seconds: float) -> None:
        """Give what is being written so long to come to its end, while the engine still runs."""
        if self._writers:
            await asyncio.wait(self._writers, timeout=seconds)

    async def close(self) -> None:
        """Wait for what is being written: it is whole then, or not there."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*self._writers, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.shelf.sweep)
            except OSError as error:
                _log.warning("expired contexts could not be removed: %s", error)
            await asyncio.sleep(_SWEEP_SECONDS)

    # --- what is there ---

    async def record(self, owner: str, context_id: str) -> Record:
        """Raises ApiError (404) if the owner has no such context; that it is another's is not told."""
        found = await asyncio.to_thread(self.shelf.get, context_id, owner)
        if found is None:
            raise self.missing(context_id)
        return found

    def missing(self, context_id: str) -> ApiError:
        """What a request is told that names a context which is not there."""
        self._open.pop(context_id, None)
        return ApiError(
            404, f"There is no context {context_id[:60]!r}", param="context", code="context_not_found"
        )

    @contextlib.asynccontextmanager
    async def _unless_removed(self, context_id: str) -> AsyncIterator[None]:
        """Whoever uses a context while another request removes it is told so: nothing failed here."""
        try:
            yield
        except ApiError as error:
            if error.code == "context_failed" and not await asyncio.to_thread(self.shelf.has, context_id):
                raise self.missing(context_id) from None
            raise

    async def open(self, owner: str, context_id: str) -> tuple[Record, Kept]:
        """A context for asking.

        Raises:
            ApiError: 404, see `record`; 400, another model read it; 500, its files are damaged.
        """
        record = await self.record(owner, context_id)
        if record.fingerprint != self.fingerprint:
            raise bad_request(
                f"The context {record.id!r} was read by another model ({record.model!r}): create it again",
                "context",
                "context_of_another_model",
            )
        kept = self._open.get(record.id)
        if kept is None:
            path, model = self.shelf.folder(record.id), self.identity
            async with self._unless_removed(record.id):
                with _told("read"):
                    kept = await asyncio.to_thread(Kept, path, model, record.id)
        self._open[record.id] = kept
        self._open.move_to_end(record.id)
        while len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return record, kept

    async def records(self, owner: str) -> list[Record]:
        return await asyncio.to_thread(self.shelf.records, owner)

    # --- changing what is there ---

    async def remove(self, owner: str, context_id: str) -> None:
        record = await self.record(owner, context_id)
        self._open.pop(record.id, None)
        await self._to_its_end(asyncio.to_thread(self.shelf.remove, record.id))

    async def change(self, owner: str, context_id: str, **fields: Any) -> Record:
        """Set fields of a record; a `ttl` counts from now on."""
        with _told("kept"):
            change = asyncio.to_thread(self.shelf.change, context_id, owner, fields)
            changed = await self._to_its_end(change)
        if changed is None:
            raise self.missing(context_id)
        return changed

    async def fork(self, wish: Wish) -> Record:
        """A second context of the same documents."""
        assert wish.base is not None, "a fork is of something"
        old = wish.base[0]
        with self._place(wish.owner) as reserve:
            await reserve(old.bytes)
            record = self._record(self.shelf.new_id(), wish, old.tokens, old.bytes, old.documents)
            async with self._unless_removed(old.id):
                with _told("kept"):
                    await self._to_its_end(asyncio.to_thread(self.shelf.fork, old.id, record))
        return record

    async def make(self, wish: Wish) -> AsyncGenerator[Progress | Record, None]:
        """Read documents and keep them: how far it is, now and then, and at the end the record. Nothing is
        left of it if the caller stops listening before.

        Raises:
            ApiError: beyond a limit (400); too slow (504); the engine or the disk failed (500, 503).
        """
        service, context_id = self.service, self.shelf.new_id()
        base, kept = wish.base or (None, None)
        async with contextlib.AsyncExitStack() as stack:
            if base is not None:
                await stack.enter_async_context(self._unless_removed(base.id))
            reserve = stack.enter_context(self._place(wish.owner))
            draft = await service.aside(lambda t: Draft(service.engine, t, wish.documents, kept))
            total = len(draft.tokens)
            service.room(total, 1, 1, "documents")
            await reserve(draft.num_bytes(service.engine))
            prompt = ChatPrompt(list(draft.tokens), (total,), (), False)
            for _ in range(_TRIES):
                run = service.submit(wish.owner, [prompt], [_READ], kept=kept)
                async with contextlib.aclosing(service.pieces(run, _PROGRESS_SECONDS)) as pieces:
                    async for _ in pieces:
                        yield Progress(context_id, min(run.ticket.read, total), total)
                yield Progress(context_id, total, total)
                record = await self._write(context_id, wish, draft)
                if record is not None:
                    yield record
                    return
        raise ApiError(
            503,
            "other requests took the memory before what was read could be kept; try again",
            code="unavailable",
            retry_after=10,
        )

    # --- writing ---

    async def _write(self, context_id: str, wish: Wish, draft: Draft) -> Record | None:
        """Keep what was read; None if it is not at hand any more. If the caller is cancelled, what was
        written is removed."""
        wanted = True
        with _told("kept"):
            writer = asyncio.ensure_future(self._write_all(context_id, wish, draft, lambda: wanted))
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)
            try:
                return await asyncio.shield(writer)
            except asyncio.CancelledError:
                wanted = False
                raise

    async def _write_all(
        self, context_id: str, wish: Wish, draft: Draft, wanted: Callable[[], bool]
    ) -> Record | None:
        record: Record | None = None
        path = self.shelf.folder(context_id)
        try:
            folder = await asyncio.to_thread(draft.begin, path, self.identity)
            try:
                while draft.written < len(draft.tokens) and wanted():
                    piece = await self.service.loop.call(lambda engine: draft.copy(engine, wish.owner))
                    if piece is None:
                        return None
                    await asyncio.to_thread(draft.add, folder, piece)
                if wanted():
                    record = await asyncio.to_thread(self._finish, context_id, wish, draft, folder)
            finally:
                folder.close()
        finally:
            if record is None or not wanted():
                await asyncio.to_thread(self.shelf.remove, context_id)
        return record

    def _finish(self, context_id: str, wish: Wish, draft: Draft, folder: ContextFolder) -> Record:
        manifest = draft.finish(folder)
        names = [name for text in manifest.texts for name in text.names]
        record = self._record(context_id, wish, manifest.tokens, manifest.num_bytes, names)
        self.shelf.put(record)
        return record

    def _record(self, context_id: str, wish: Wish, tokens: int, size: int, names: list[str]) -> Record:
        now = int(self.shelf.clock())
        return Record(
            id=context_id,
            owner=wish.owner,
            model=self.service.name,
            fingerprint=self.fingerprint,
            tokens=tokens,
            bytes=size,
            documents=names,
            created=now,
            ttl=wish.ttl,
            renewed=now,
            pinned=wish.pinned,
            parent=None if wish.base is None else wish.base[0].id,
        )

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it, also if whoever wants it goes away meanwhile."""
        task = asyncio.ensure_future(work)
        self._writers.add(task)
        task.add_done_callback(self._writers.discard)
        return await asyncio.shield(task)

    # --- limits ---

    @contextlib.contextmanager
    def _place(self, owner: str) -> Iterator[Callable[[int], Coroutine[Any, Any, None]]]:
        """Room for one context more; call what it gives with the bytes that it will take.

        Raises:
            ApiError: 400, beyond what a key may keep.
        """
        options, reserved = self.service.options, 0

        async def reserve(size: int) -> None:
            nonlocal reserved
            kept = await self.records(owner)
            if len(kept) + self._making[owner] > options.max_contexts_per_key:
                raise bad_request(
                    f"{len(kept)} contexts of this key are kept or under way, the limit is "
                    f"{options.max_contexts_per_key}: delete some",
                    code="context_quota_exceeded",
                )
            used = sum(record.bytes for record in kept) + self._reserved[owner]
            most = options.max_context_bytes_per_key
            if used + size > most:
                raise bad_request(
                    f"the context would take {size:,} bytes beside {used:,} that are kept for this key, the "
                    f"limit is {most:,}: delete some contexts",
                    code="context_quota_exceeded",
                )
            reserved = size
            self._reserved[owner] += size

        self._making[owner] += 1
        try:
            yield reserve
        finally:
            self._making[owner] -= 1
            self._reserved[owner] -= reserved


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Failures of files and of a stopping engine, as a client may hear of them: without a path.

    Raises:
        ApiError: 500 or 503.
    """
    try:
        yield
    except Closed as error:
        raise shutting_down(str(error)) from None
    except (ValueError, OSError) as error:
        _log.error("a context could not be %s: %s", what, error)
        raise ApiError(
            500, f"the context could not be {what}; the server's log says why", code="context_failed"
        ) from None
