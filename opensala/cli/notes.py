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
    restored = f" ({result.restored_tokens:,} of them in an earlier run)" if result.restored_tokens else ""
    print(
        f"{result.prompt_tokens:,} tokens read{restored}, first token after "
        f"{result.time_to_first_token:.2f} s ({result.prefill_tokens_per_second:,.0f} tokens/s){decode}; "
        f"cache {result.cache_bytes / 2**20:,.1f} MiB, "
        f"peak memory {result.peak_memory_bytes / 2**20:,.0f} MiB",
        file=sys.stderr,
    )
