"""Bookkeeping of what sequences remember: pages, state slots and the tree of prefixes. Integers only, no
tensors."""

from .pool import Pool, PoolExhausted
from .prefix import Match, Node, PrefixTree, Snapshot

__all__ = ["Match", "Node", "Pool", "PoolExhausted", "PrefixTree", "Snapshot"]
