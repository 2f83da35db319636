"""Texts that stay at hand until somebody lets them go: open contexts.

What they hold of pages and slots is nobody else's, so a text is refused that would leave what runs and waits
without room. Integers only, as the scheduler.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..cache import Pool, PrefixTree
from .request import Sequence, common_length


@dataclass(eq=False)
class Hold:
    """A text that stays at hand until it is let go: its tokens, the mode they were read in, the pages they
    lie in, the slot of the states behind the last of them, and the namespace whose prompts may find it."""

    tokens: array
    sparse: bool
    pages: list[int]
    slot: int
    namespace: str = ""


class Holds:
    """The texts that are held; iterate over it for them.

    Args:
        pages, slots, tree, page_size: those of the scheduler.
        sequences: its waiting and running sequences.
    """

    def __init__(
        self,
        pages: Pool,
        slots: Pool,
        tree: PrefixTree,
        page_size: int,
        sequences: Callable[[], Iterable[Sequence]],
    ) -> None:
        self.pages, self.slots, self.tree, self.page_size = pages, slots, tree, page_size
        self._sequences = sequences
        self._texts: list[Hold] = []

    def __iter__(self) -> Iterator[Hold]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def hold(self, tokens: array, sparse: bool, namespace: str = "") -> Hold | None:
        """Keep a text that was read in this mode; None if it is not at hand to its end, with its states."""
        match = self.tree.match(tokens, sparse, len(tokens), namespace)
        if match.length < len(tokens) or match.slot is None:
            return None
        self._check(match.pages)
        self.pages.share(match.pages)
        self.slots.share([match.slot])
        self._texts.append(Hold(tokens, sparse, match.pages, match.slot, namespace))
        return self._texts[-1]

    def place(self, tokens: array, sparse: bool, namespace: str = "") -> Hold:
        """Pages and a slot for a text that comes from elsewhere; `settle` makes it known once they are
        filled.

        Raises:
            ValueError: there is not so much memory beside what is in use.
        """
        pages = -(-len(tokens) // self.page_size)
        self._check(range(-pages, 0))
        if not self.tree.make_room(pages, 1):
            raise ValueError(
                f"{len(tokens):,} tokens need {pages:,} pages and a state slot; {self.pages.num_free:,} of "
                f"{self.pages.size:,} pages and {self.slots.num_free} of {self.slots.size} slots are free: "
                "wait for running requests, close other contexts, give the engine more memory, or bound "
                "what of a context is in memory (--host-memory)"
            )
        self._texts.append(Hold(tokens, sparse, self.pages.take(pages), self.slots.take()[0], namespace))
        return self._texts[-1]

    def settle(self, hold: Hold, restored: bool = False) -> None:
        """Let prompts find a text whose pages and states have been filled; `restored`: with what an engine
        of before a restart had computed."""
        swapped = self.tree.insert(hold.tokens, hold.sparse, hold.pages, hold.slot, hold.namespace, restored)
        self.pages.share(swapped.values())
        self.pages.release(swapped)
        hold.pages = [swapped.get(page, page) for page in hold.pages]

    def let_go(self, hold: Hold) -> None:
        """Hold a text no longer: it is remembered as long as there is room."""
        self._texts.remove(hold)
        self.pages.release(hold.pages)
        self.slots.release([hold.slot])

    def room(self, tokens: array, sparse: bool, namespace: str = "") -> int:
        """Tokens that a prompt which begins with these can come to, beside the texts that are held."""
        held = {page for hold in self._texts for page in hold.pages}
        shared = (
            len(h.tokens) // self.page_size
            for h in self._texts
            if h.namespace == namespace
            and h.sparse == sparse
            and common_length(h.tokens, tokens) == len(h.tokens) < len(tokens)
        )
        return (self.pages.size - 1 - len(held) + max(shared, default=0)) * self.page_size

    def _check(self, pages: Iterable[int]) -> None:
        """Refuse to hold one text more, in these pages, if slots or what runs and waits would not fit
        beside."""
        if len({h.slot for h in self._texts}) + 3 > self.slots.size:
            raise ValueError(
                f"{len(self._texts)} contexts are open, and the {self.slots.size} state slots hold no more: "
                "close one, or give the engine more max_snapshots"
            )
        held = {page for hold in self._texts for page in hold.pages} | set(pages)
        longest = max((s.room for s in self._sequences()), default=0)
        if longest and -(-longest // self.page_size) > self.pages.size - 1 - len(held):
            raise ValueError(
                f"a request of up to {longest:,} tokens is under way, which would not fit beside the open "
                "contexts: wait for its end, close other contexts, or give the engine more memory"
            )
