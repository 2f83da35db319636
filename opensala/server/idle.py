"""What a server does when nobody asks: it gives memory back that requests have left free."""

import asyncio

from ..engine.memory import release_free_memory
from .limits import Gate

_SECONDS = 10.0  # between looks


async def release_when_idle(gate: Gate) -> None:
    """Release free memory whenever requests came and none is left; it never returns.

    A request leaves behind what the C library keeps of it (its body, its tokens, tensors of its steps), up
    to tens of megabytes after many at a time. Not right after each: the next one would have to ask anew.
    """
    released = 0
    while True:
        await asyncio.sleep(_SECONDS)
        entered = gate.num_entered
        if entered != released and not gate.num_inside:
            await asyncio.to_thread(release_free_memory)
            released = entered
