"""Which sequences compute which of their tokens in the next step, and who gives way when memory is short.

Decoding sequences come first, then prompts in the order of their arrival, as many tokens as the budget of a
step allows; where prompts of several namespaces (owners) are to be read, each gets an equal part of it. Pages
are taken as they are needed; when none is left, what the prefix tree remembers is forgotten, the least
recently used first, and then the youngest running sequence is put back to wait: it will be read again.

Integers only: no tensors, no model.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..cache import Match, Pool, PrefixTree
from .holds import Holds
from .request import FinishReason, Reuse, Sequence, Status, common_length


@dataclass(eq=False, slots=True)
class Work:
    """`count` next tokens of a sequence (the last `drafted` of them guesses), computed in one mode.

    Attributes:
        slot: where the states behind them go; the sequence's own slot stays as it is until the step is done.
        reads: whether it computes tokens that were known before, and not just the one chosen last.
        completes: whether all tokens known are computed behind it, so that the next one can be chosen.
    """

    sequence: Sequence
    count: int
    sparse: bool
    slot: int
    drafted: int
    reads: bool
    completes: bool


@dataclass
class Step:
    """What to do next: first copy pages (from, to), then compute. `admitted` began with this step."""

    works: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """Bounds of a step.

    Attributes:
        max_batch_tokens: tokens computed in one step.
        max_running: sequences that hold memory at a time.
        snapshot_interval: a snapshot every so many tokens of a prompt; 0 for none.
        min_shared: prompts that begin with so many equal tokens share the reading of them.
        max_read_tokens: tokens read in a step that also decodes; None for as many as max_batch_tokens leaves.
    """

    max_batch_tokens: int
    max_running: int
    snapshot_interval: int
    min_shared: int
    max_read_tokens: int | None = None


class Scheduler:
    """Waiting and running sequences over pools of pages and slots.

    Args:
        pages, slots: the pools. There must be two slots for each running sequence.
        page_size: tokens per page.
        limits: bounds of a step.
    """

    def __init__(self, pages: Pool, slots: Pool, page_size: int, limits: Limits) -> None:
        self.pages, self.slots, self.page_size, self.limits = pages, slots, page_size, limits
        self.tree = PrefixTree(pages, slots, page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of arrival
        self.holds = Holds(pages, slots, self.tree, page_size, self.sequences)
        self._step: Step | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    # --- coming and going ---

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn.

        Prompts that begin alike get a mark where they part, so that what they share is read once.
        """
        for other in self.sequences():
            if other.is_reading and _may_share(other, sequence):
                common = min(
                    common_length(other.tokens, sequence.tokens), other.num_prompt - 1, sequence.reuse_limit
                )
                if common >= self.limits.min_shared and common > other.num_cached:
                    _mark(other, common)
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence: what it computed is remembered, its memory is given back."""
        if sequence.status is Status.RUNNING:
            if reason is not FinishReason.ERROR:
                self.remember(sequence, sequence.num_cached)
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def remember(self, sequence: Sequence, length: int) -> None:
        """Put the first `length` tokens, which end where the states stand, into the prefix tree.

        Only as far as a prompt of these tokens would have been read in the same mode.
        """
        if not length or sequence.slot < 0 or sequence.uniform_length() < length:
            return
        swapped = self.tree.insert(
            sequence.tokens[:length],
            sequence.is_sparse(0),
            sequence.pages,
            sequence.slot,
            sequence.namespace,
        )
        for i, page in enumerate(sequence.pages[: length // self.page_size]):
            if page in swapped:
                self.pages.share([swapped[page]])
                self.pages.release([page])
                sequence.pages[i] = swapped[page]

    def wanted_length(self, sequence: Sequence) -> int:
        """How many of its first tokens need not be read if they are at hand: all of one mode but the last
        one."""
        limit = sequence.reuse_limit
        return sequence.mode_end(0, limit) if limit else 0

    # --- a step ---

    def schedule(self) -> Step:
        """The next step; it holds what it needs until `commit` or `discard`.

        An empty step with work left cannot happen: a sequence that is alone always fits, for `Engine.add` saw
            to it.
        """
        self._step = step = Step()
        budget = self.limits.max_batch_tokens
        decoding: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self.running:
            if pending := sequence.num_pending:
                (decoding if pending == 1 else reading).append(sequence)
        for sequence in decoding:
            if sequence.status is Status.RUNNING and budget > 0:  # it may have given way to an earlier one
                budget -= self._plan(sequence, step, budget)
        if step.works and self.limits.max_read_tokens is not None:  # else nobody waits for the next token
            budget = min(budget, self.limits.max_read_tokens)
        parts = _equal_parts(budget, [*reading, *self.waiting])
        self._read(reading, step, parts)
        self._admit_waiting(step, parts)
        if not step.works:  # a tiny budget, all of it for those that wait for something
            self._read(reading[:1], step, {s.namespace: budget for s in reading[:1]})
        return step

    def _read(self, sequences: list[Sequence], step: Step, parts: dict[str, int]) -> None:
        for sequence in sequences:
            part = parts[sequence.namespace]
            if sequence.status is Status.RUNNING and part > 0:
                parts[sequence.namespace] -= self._plan(sequence, step, part)

    def _admit_waiting(self, step: Step, parts: dict[str, int]) -> None:
        """Start waiting sequences, first come first, as far as their owners' parts of the budget go. Nobody
        overtakes one that waits for memory, which would never come."""
        for sequence in list(self.waiting):
            part = parts.get(sequence.namespace, 0)  # none for what gave way in this step
            if part <= 0:
                continue
            if len(self.running) >= self.limits.max_running:
                return
            if self._is_being_read(sequence):
                parts[sequence.namespace] = 0  # those of its owner behind it wait too
            elif self._admit(sequence, step):
                parts[sequence.namespace] -= self._plan(sequence, step, part)
            else:
                return

    def commit(self, work: Work, kept: int) -> None:
        """Note that the first `kept` tokens of a work are computed and its states stand behind the last of
        them."""
        sequence = work.sequence
        assert self._step is not None, "schedule comes first"
        self._step.works.remove(work)
        if sequence.slot >= 0:
            self.slots.release([sequence.slot])
        sequence.slot, sequence.last_slot = work.slot, sequence.slot
        sequence.num_cached += kept
        if sequence.num_cached in sequence.marks:
            sequence.marks.remove(sequence.num_cached)
            self.remember(sequence, sequence.num_cached)

    def trim(self, sequence: Sequence) -> None:
        """Give back pages behind the cached tokens."""
        needed = -(-sequence.num_cached // self.page_size)
        self.pages.release(sequence.pages[needed:])
        del sequence.pages[needed:]

    def discard(self, step: Step) -> None:
        """Forget a step that did not finish: sequences are as they were before it."""
        for work in step.works:
            self.slots.release([work.slot])
            self.trim(work.sequence)
        step.works.clear()
        for sequence in step.admitted:
            if sequence.status is Status.RUNNING and not sequence.preemptions:
                sequence.reuse = None
            if sequence.status is Status.RUNNING:
                self._put_back(sequence)

    def _plan(self, sequence: Sequence, step: Step, budget: int) -> int:
        """Add a work for the sequence, with its pages and slot; returns its number of tokens (0: it had to
        give way)."""
        cached, pending = sequence.num_cached, sequence.num_pending
        draft = 0 if pending != 1 else len(sequence.draft)
        end = cached + min(pending + draft, budget)
        sparse = sequence.is_sparse(cached)
        if end > cached + 1:
            end = sequence.mode_end(cached, end)
        if pending > 1:
            end = min(end, sequence.next_mark(end))
        count = end - cached
        needed = max(0, -(-end // self.page_size) - len(sequence.pages))
        if not self._make_room(sequence, step, needed, 1):
            return 0
        if needed:
            sequence.pages.extend(self.pages.take(needed))
        drafted = max(0, count - pending)
        completes = count - drafted == pending
        step.works.append(
            Work(
                sequence,
                count,
                sparse,
                self.slots.take_again(sequence.last_slot),
                drafted,
                pending > 1,
                completes,
            )
        )
        return count

    def _make_room(self, sequence: Sequence, step: Step, pages: int, slots: int) -> bool:
        """See that so many pages and slots are free; False if the sequence itself is the one to give way."""
        while True:
            if self.slots.num_free < slots:
                self.tree.evict_slots(slots)
            if self.pages.num_free < pages:
                self.tree.evict_pages(max(pages, self.pages.size // 64))
            if self.pages.num_free >= pages and self.slots.num_free >= slots:
                return True
            youngest = max(self.running, key=lambda s: s.arrival)
            self._preempt(youngest, step)
            if youngest is sequence:
                return False

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Take a sequence's memory; it waits, first in line, to be computed again."""
        for work in [w for w in step.works if w.sequence is sequence]:
            self.slots.release([work.slot])
            step.works.remove(work)
        self._put_back(sequence)
        sequence.preemptions += 1

    def _put_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.status, sequence.num_cached = Status.WAITING, 0
        self.waiting.appendleft(sequence)

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether more of a waiting sequence's prompt is just being read by another one: it waits for
        that."""
        limit = sequence.reuse_limit
        here = self.tree.match(sequence.tokens, sequence.is_sparse(0), limit, sequence.namespace).length
        for other in self.running:
            if other.is_reading and _may_share(other, sequence):
                common = min(common_length(other.tokens, sequence.tokens), limit)
                coming = [m for m in other.marks if other.num_cached < m <= common]
                if coming and max(coming) >= here + self.limits.min_shared:
                    return True
        return False

    def _admit(self, sequence: Sequence, step: Step) -> bool:
        """Start a waiting sequence from the longest beginning that is at hand; False if there is no memory
        for it."""
        sparse = sequence.is_sparse(0)
        limit = self.wanted_length(sequence)
        match = self.tree.match(sequence.tokens, sparse, limit, sequence.namespace)
        full, part = divmod(match.length, self.page_size)
        self.pages.share(match.pages)  # held before anything is evicted to make room
        self.slots.share([match.slot] if match.slot is not None else [])
        first = min(sequence.num_tokens, match.length + self.limits.max_batch_tokens)
        needed = -(-first // self.page_size) - full
        enough = self.tree.make_room(needed, 2)
        if enough:
            sequence.pages.extend(match.pages[:full])
            sequence.slot = match.slot if match.slot is not None else -1
            if part:
                copy = self.pages.take()[0]
                step.copies.append((match.pages[full], copy))
                self.pages.release(
                    [match.pages[full]]
                )  # stays as it is until the step is done: see Engine.step
                sequence.pages.append(copy)
            self._start(sequence, match)
            step.admitted.append(sequence)
        else:
            self.pages.release(match.pages)
            self.slots.release([match.slot] if match.slot is not None else [])
        return enough

    def _start(self, sequence: Sequence, match: Match) -> None:
        reused, paged = match.length, match.paged
        self.waiting.remove(sequence)
        sequence.status, sequence.num_cached = Status.RUNNING, reused
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        if sequence.reuse is None:
            why = _why(sequence, reused, paged)
            sequence.reuse = Reuse(reused, sequence.num_prompt - reused, why, match.restored)
            if paged >= reused + self.limits.min_shared and paged < sequence.num_prompt:
                _mark(sequence, paged)  # where this text parts from another: the next one may continue here
        interval = self.limits.snapshot_interval
        for place in range(interval, sequence.num_prompt, interval) if interval else ():
            _mark(sequence, place)

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        self.slots.release([sequence.slot] if sequence.slot >= 0 else [])
        del sequence.pages[:]
        sequence.slot = -1

    # --- integrity ---

    def check_integrity(self) -> None:
        """Assert that every page and slot is held by exactly those that say so. Between steps, and within
        one."""
        works = self._step.works if self._step else []
        held_pages = [s.pages for s in self.running]
        held_slots = [[s.slot] for s in self.running if s.slot >= 0] + [[w.slot] for w in works]
        held_pages += [h.pages for h in self.holds]  # type: ignore[misc]  # lists and arrays of integers
        held_slots += [[h.slot] for h in self.holds]
        self.pages.check_integrity([*held_pages, list(self.tree.held_pages())])
        self.slots.check_integrity([*held_slots, list(self.tree.held_slots())])
        self.tree.check_integrity()
        for sequence in self.waiting:
            assert not sequence.pages and sequence.slot < 0, f"{sequence.request_id} waits and holds memory"
        for sequence in self.running:
            needed = -(-sequence.num_cached // self.page_size)
            assert len(sequence.pages) >= needed, f"{sequence.request_id} lacks pages"


def _equal_parts(budget: int, sequences: Iterable[Sequence]) -> dict[str, int]:
    """A budget of tokens by namespace: equal parts, but for those that want less."""
    wanted: Counter[str] = Counter()
    for sequence in sequences:
        wanted[sequence.namespace] += sequence.num_pending
    parts = {}
    for left, namespace in zip(
        range(len(wanted), 0, -1), sorted(wanted, key=wanted.__getitem__), strict=True
    ):
        parts[namespace] = min(wanted[namespace], -(-budget // left))
        budget -= parts[namespace]
    return parts


def _may_share(a: Sequence, b: Sequence) -> bool:
    """Whether one may continue from what the other reads."""
    return a.namespace == b.namespace and a.is_sparse(0) == b.is_sparse(0)


def _mark(sequence: Sequence, place: int) -> None:
    if place not in sequence.marks and 0 < place < sequence.num_prompt:
        sequence.marks.append(place)
        sequence.marks.sort()


def _why(sequence: Sequence, reused: int, paged: int) -> str:
    """Why the rest of the prompt has to be read."""
    if reused >= sequence.num_prompt - 1:
        return "only the last token had to be read, to predict from"
    if paged >= reused + 64:
        return (
            f"{paged} tokens were at hand as keys and values, but no states were kept behind token {reused}"
        )
    return (
        "this text was not read before, or is no longer at hand"
        if not reused
        else "the text differs from here on, or was not read further"
    )
