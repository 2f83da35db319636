"""The prefix tree: which beginnings of texts have been read, by content, and where their pages and states
lie.

A node is one full page of tokens below the page before it. A *tail* is the beginning of a page that ends at a
snapshot. Keys and values alone are worth nothing to a hybrid model: a text can be continued only where there
is a snapshot of its states too, so a match ends at the deepest snapshot, and says how far the pages alone
would have
gone. Texts read densely and texts read sparsely stand in trees of their own: a token's keys and values depend
on the mode in which the tokens before it were read. So do the texts of each namespace: what was read in one
is never found, nor its length told, in another.

Snapshots are evicted apart from pages, the least recently used first.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from .pool import Pool

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True, weakref_slot=True)  # a text of a million tokens has 16,000 of them
class Node:
    """A page of tokens, or its beginning up to a snapshot (a tail).

    Attributes:
        tokens: the tokens of the page; fewer than a page holds in a tail.
        page: the place of its keys and values; -1 in a root.
        slot: the place of the states behind its last token, or None.
        used: when it was last matched or inserted, by the tree's clock.
        restored: whether its page was read from disk and not computed here.
    """

    tokens: Tokens
    page: int
    parent: "Node | None"
    slot: int | None = None
    used: int = 0
    restored: bool = False
    children: dict[Tokens, "Node"] = field(default_factory=dict)
    tails: dict[Tokens, "Node"] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """What is there of a text.

    Attributes:
        length: tokens that need not be read again: up to the deepest snapshot.
        pages: the pages that hold them; the last one is held in part if `length` does not fill it, and must
            be copied before it is written to.
        slot: the snapshot's states; None if `length` is 0.
        paged: tokens whose keys and values are there, with or without a snapshot behind them.
        restored: of `length`, tokens whose keys and values were read from disk and not computed here.
    """

    length: int
    pages: list[int]
    slot: int | None
    paged: int
    restored: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A text of the tree that can be continued: its namespace, its mode, its number of tokens, and the node
    it ends at."""

    namespace: str
    sparse: bool
    length: int
    node: Node

    def text(self) -> tuple[list[int], list[int]]:
        """Its tokens, and the pages that hold them."""
        path, node = [], self.node
        while node.parent is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        return [token for n in path for token in n.tokens], [n.page for n in path]


class PrefixTree:
    """Texts of the past that are still at hand.

    Args:
        pages: the pool of pages.
        slots: the pool of state slots.
        page_size: tokens per page.
    """

    def __init__(self, pages: Pool, slots: Pool, page_size: int) -> None:
        self.pages, self.slots, self.page_size = pages, slots, page_size
        self._roots: dict[tuple[str, bool], Node] = {}  # by namespace and mode, those that hold something
        self._snapshots: set[Node] = set()
        # how often the tree itself holds a page: a tail may share a node's
        self._held: Counter[int] = Counter()
        self.now = 0  # counts uses

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    def _tick(self) -> int:
        self.now += 1
        return self.now

    def match(self, tokens: Sequence[int], sparse: bool, limit: int, namespace: str = "") -> Match:
        """The longest beginning of `tokens`, of at most `limit` tokens, that can be continued; nothing is
        held by it."""
        root = self._roots.get((namespace, sparse)) or Node((), -1, None)
        path, tail = self._deepest_snapshot(root, tokens, limit)
        last = tail or (path.nodes[path.snapshot - 1] if path.snapshot else None)
        nodes = path.nodes[: path.snapshot] + ([tail] if tail else [])
        now = self._tick()
        for node in nodes:
            node.used = now
        return Match(
            length=sum(len(node.tokens) for node in nodes),
            pages=[node.page for node in nodes],
            slot=last.slot if last else None,
            paged=len(path.nodes) * self.page_size,
            restored=sum(len(node.tokens) for node in nodes if node.restored),
        )

    def snapshots(self) -> list[Snapshot]:
        """All texts that can be continued, the most recently used first."""
        found: list[Snapshot] = []
        for where, root in self._roots.items():
            stack = [(root, 0)]
            while stack:
                node, length = stack.pop()
                if node.slot is not None:
                    found.append(Snapshot(*where, length, node))
                below = (*node.children.values(), *node.tails.values())
                stack += [(n, length + len(n.tokens)) for n in below]
        return sorted(found, key=lambda s: s.node.used, reverse=True)

    def stops(self, text: Snapshot) -> Iterator[Snapshot]:
        """The texts that can be continued and begin this one, from the shortest to itself."""
        tokens = tuple(text.text()[0])
        node, length = self._roots[(text.namespace, text.sparse)], 0
        while True:
            ends = [n for key, n in node.tails.items() if tokens[length : length + len(key)] == key]
            for tail in sorted(ends, key=lambda n: len(n.tokens)):
                yield Snapshot(text.namespace, text.sparse, length + len(tail.tokens), tail)
            child = node.children.get(tokens[length : length + self.page_size])
            if child is None:
                return
            node, length = child, length + self.page_size
            if node.slot is not None:
                yield Snapshot(text.namespace, text.sparse, length, node)

    def _deepest_snapshot(self, root: Node, tokens: Sequence[int], limit: int) -> tuple["_Path", Node | None]:
        path, node, best = _Path([], 0), root, None
        while True:
            start = len(path.nodes) * self.page_size
            rest = tuple(tokens[start : min(start + self.page_size, limit)])
            for length in range(min(len(rest), self.page_size - 1), 0, -1) if node.tails else ():
                if rest[:length] in node.tails:
                    path.snapshot, best = len(path.nodes), node.tails[rest[:length]]
                    break
            child = node.children.get(rest) if len(rest) == self.page_size else None
            if child is None:
                return path, best
            node = child
            path.nodes.append(node)
            if node.slot is not None:
                path.snapshot, best = len(path.nodes), None

    def insert(
        self,
        tokens: Sequence[int],
        sparse: bool,
        pages: Sequence[int],
        slot: int | None,
        namespace: str = "",
        restored: bool = False,
    ) -> dict[int, int]:
        """Remember that `tokens` lie in `pages`, and that `slot` holds the states behind the last of them.

        The tree holds what it remembers once more by itself. Pages whose content stood in the tree before are
        not
        held twice: the number of each page maps to the one to use instead, for the caller to swap.

        Without a slot, only full pages are remembered. Only matches of the same namespace find them.
        `restored` says that the pages were read from disk and not computed here.
        """
        full = len(tokens) // self.page_size
        if not full and (slot is None or not len(tokens)):
            return {}  # nothing to remember
        root = self._roots.setdefault((namespace, sparse), Node((), -1, None))
        node, swapped, now = root, dict[int, int](), self._tick()
        for i in range(full):
            key = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = self._new_node(key, pages[i], node, restored)
            elif child.page != pages[i]:
                swapped[pages[i]] = child.page
            node = child
            node.used = now
        if slot is None:
            return swapped
        key = tuple(tokens[full * self.page_size :])
        if key:
            tail = node.tails.get(key)
            if tail is None:
                tail = node.tails[key] = self._new_node(key, pages[full], node, restored)
            node = tail
            node.used = now
        if node.slot is None and node.parent is not None:
            node.slot = slot
            self.slots.share([slot])
            self._snapshots.add(node)
        return swapped

    def evict_slots(self, wanted: int) -> None:
        """Forget the least recently used snapshots until `wanted` slots are free or none is left to
        forget."""
        for node in sorted(self._snapshots, key=lambda n: n.used):
            if self.slots.num_free >= wanted:
                return
            if self.slots.references(node.slot) == 1:  # type: ignore[arg-type]  # it has one
                self._forget_snapshot(node)

    def evict_pages(self, wanted: int) -> None:
        """Forget the least recently used leaves until `wanted` pages are free or none is left to forget.

        Pages that a sequence is using are not freed by forgetting them; they are kept.
        """
        heap = [(n.used, i, n) for i, n in enumerate(self._nodes()) if self._is_evictable(n)]
        heapq.heapify(heap)
        order = count(len(heap))
        while heap and self.pages.num_free < wanted:
            node = heapq.heappop(heap)[2]
            parent = node.parent
            self._remove(node)
            if parent is not None and self._is_evictable(parent):
                heapq.heappush(heap, (parent.used, next(order), parent))

    def make_room(self, pages: int, slots: int) -> bool:
        """Forget until so many pages and slots are free; whether they are."""
        if self.slots.num_free < slots:
            self.evict_slots(slots)
        if self.pages.num_free < pages:
            self.evict_pages(pages)
        return self.pages.num_free >= pages and self.slots.num_free >= slots

    def clear(self) -> None:
        """Forget everything."""
        for node in list(self._nodes()):
            self._let_go(node)
            if node.slot is not None:
                self.slots.release([node.slot])
        self._snapshots.clear()
        self._roots.clear()

    def held_pages(self) -> Iterator[int]:
        return (node.page for node in self._nodes())

    def held_slots(self) -> Iterator[int]:
        return (node.slot for node in self._nodes() if node.slot is not None)

    def check_integrity(self) -> None:
        """Assert that nodes, snapshots and keys agree with one another."""
        nodes = list(self._nodes())
        assert self._held == Counter(n.page for n in nodes), "the count of pages is wrong"
        assert {n for n in nodes if n.slot is not None} == self._snapshots, "the set of snapshots is wrong"
        assert all(r.children or r.tails for r in self._roots.values()), "an empty namespace was kept"
        for node in nodes:
            assert node.parent is not None, "a node hangs below its parent"
            is_tail = len(node.tokens) < self.page_size
            family = node.parent.tails if is_tail else node.parent.children
            assert family.get(node.tokens) is node, "a node stands under its own tokens"
            assert not (is_tail and (node.children or node.tails or node.slot is None)), (
                "a tail is only a snapshot"
            )

    def _is_evictable(self, node: Node) -> bool:
        leaf = node.parent is not None and not node.children and not node.tails
        alone = leaf and self.pages.references(node.page) == self._held[node.page]
        return alone and (node.slot is None or self.slots.references(node.slot) == 1)

    def _new_node(self, tokens: Tokens, page: int, parent: Node, restored: bool) -> Node:
        self.pages.share([page])
        self._held[page] += 1
        return Node(tokens, page, parent, restored=restored)

    def _let_go(self, node: Node) -> None:
        self.pages.release([node.page])
        self._held[node.page] -= 1
        if not self._held[node.page]:
            del self._held[node.page]

    def _remove(self, node: Node) -> None:
        assert node.parent is not None, "a root is never removed"
        family = node.parent.tails if len(node.tokens) < self.page_size else node.parent.children
        del family[node.tokens]
        self._let_go(node)
        if node.slot is not None:
            self.slots.release([node.slot])
            self._snapshots.discard(node)
        if node.parent.parent is None:
            self._drop_empty_roots()

    def _drop_empty_roots(self) -> None:
        for where in [w for w, root in self._roots.items() if not (root.children or root.tails)]:
            del self._roots[where]

    def _forget_snapshot(self, node: Node) -> None:
        if len(node.tokens) < self.page_size:  # a tail is nothing without it
            self._remove(node)
            return
        assert node.slot is not None, "it is among the snapshots"
        self.slots.release([node.slot])
        node.slot = None
        self._snapshots.discard(node)

    def _nodes(self) -> Iterator[Node]:
        return (node for root in self._roots.values() for node in _below(root))


def _below(root: Node) -> Iterator[Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        if node.parent is not None:
            yield node
        stack += [*node.children.values(), *node.tails.values()]


@dataclass
class _Path:
    """Full pages that match, and how many of them lie before the deepest snapshot."""

    nodes: list[Node]
    snapshot: int
