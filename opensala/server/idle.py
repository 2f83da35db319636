"""What a server does when nobody asks: it gives memory back that requests have left free."""

import asyncio
from collections.abc import Callable

from ..engine.memory import release_free_memory
from .limits import Gate


async def release_when_idle(
    gate: Gate, seconds: float = 10.0, release: Callable[[], object] = release_free_memory
) -> None:
    """Call `release` whenever requests came and none is left; look every `seconds`; it never returns.

    A request leaves behind what the C library keeps of it (its body, its tokens, tensors of its steps), up
    to tens of megabytes after many at a time. Not right after each: the next one would have to ask anew.
    """
    seen = 0
    while True:
        await asyncio.sleep(seconds)
        entered = gate.num_entered
        if entered != seen and not gate.num_inside:
            await asyncio.to_thread(release)
            seen = entered
