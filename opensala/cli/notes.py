"""What commands say on stderr beside their answer: what was left out, and what it cost."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine import Generation, Reading

_SHOWN = 5  # entries of a folder that are named when they were skipped; --json has them all


def show_skipped(reading: "Reading") -> None:
    """Say on stderr what was left out of the documents, before the long work begins."""
    for note in reading.notes:
        print(f"note: {note}", file=sys.stderr)
    for skipped in reading.skipped[:_SHOWN]:
        print(f"note: skipped {skipped.name}: {skipped.reason}", file=sys.stderr)
    more = len(reading.skipped) - _SHOWN
    if more > 0:
        print(f"note: and {more:,} more skipped (--json lists them all)", file=sys.stderr)


def show_cost(result: "Generation") -> None:
    """Print what a generation cost to stderr; how it attended was logged, and shown, as it began."""
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    rate = result.decode_tokens_per_second
    decode = "" if rate is None else f", then {rate:,.1f} tokens/s"
    print(
        f"{result.prompt_tokens:,} tokens read, first token after {result.time_to_first_token:.2f} s "
        f"({result.prefill_tokens_per_second:,.0f} tokens/s){decode}; cache "
        f"{result.cache_bytes / 2**20:,.1f} MiB, peak memory {result.peak_memory_bytes / 2**20:,.0f} MiB",
        file=sys.stderr,
    )
