"""Bookkeeping of what sequences remember: pages, state slots and the tree of prefixes. Integers only, no
tensors."""

from .pool import Pool, PoolExhausted
from .prefix import Match, PrefixTree

__all__ = ["Match", "Pool", "PoolExhausted", "PrefixTree"]
