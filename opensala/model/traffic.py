"""What moves between tiers of memory: counted, and said."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tiers import Tiers


class Counter:
    """Bytes and pages that were read from disk."""

    def __init__(self) -> None:
        self.bytes = 0
        self.pages = 0


@dataclass
class Traffic:
    """Of one tier: how often a layer's page was wanted and at hand, wanted and fetched, and gave way."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float | None:
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else None


def stats(tiers: "Tiers") -> dict[str, int]:
    """Counts since the engine was made: pages (of one layer) wanted and at hand, wanted and fetched, and
    given way, by tier; bytes moved up; pages read ahead of their use, and of them those then used."""
    found = {"disk_bytes_read": tiers.counter.bytes, "disk_pages_read": tiers.counter.pages}
    found |= {"pages_read_ahead": tiers.ahead.read, "pages_read_ahead_used": tiers.ahead.used}
    levels = {"host": (tiers.traffic, tiers.host)}
    if tiers.device is not None:
        levels["device"] = (tiers.device_traffic, tiers.device.frames)
        found["device_bytes_copied"] = tiers.copied
    for name, (traffic, frames) in levels.items():
        for what in ("hits", "misses", "evictions"):
            found[f"{name}_{what}"] = getattr(traffic, what)
        found[f"{name}_bytes"] = frames.count * tiers.page_bytes
    return found


def describe(tiers: "Tiers") -> str:
    """The same for people, in one line."""
    n, parts = stats(tiers), []
    for name in ("device", "host"):
        wanted = n.get(f"{name}_hits", 0) + n.get(f"{name}_misses", 0)
        if wanted:
            parts.append(
                f"{name}: {n[f'{name}_hits'] / wanted:.0%} of {wanted:,} pages wanted were at hand, "
                f"{n[f'{name}_bytes']:,} bytes there, {n[f'{name}_evictions']:,} gave way"
            )
    if tiers.copied:
        parts.append(f"{tiers.copied:,} bytes copied to the device")
    if tiers.ahead.read:
        parts.append(f"{tiers.ahead.used:,} of {tiers.ahead.read:,} pages read ahead were used")
    return "; ".join(parts)
