"""What a server does when nobody asks: it gives memory back, first what requests left free, then what it
remembers of them."""

import asyncio
import gc
from collections.abc import Awaitable, Callable

from ..engine.memory import release_free_memory
from .limits import Gate


async def release_when_idle(
    gate: Gate,
    is_busy: Callable[[], bool],
    forget: Callable[[], Awaitable[None]],
    forget_seconds: float,
    seconds: float = 10.0,
    release: Callable[[], object] = release_free_memory,
) -> None:
    """Call `release` whenever there were requests and none is left, and `forget` (and `release` once more)
    when there were none for `forget_seconds` after that; look every `seconds`; it never returns.

    A request leaves behind what the C library keeps of it (its body, its tokens, tensors of its steps), up
    to tens of megabytes after many at a time. Not right after each: the next one would have to ask anew.

    Args:
        is_busy: whether the engine computes something; not only for requests that are under way (a context
            is read behind the one that made it).
        forget_seconds: 0 for never.
    """
    seen, was_busy, idle, forgotten = 0, False, 0.0, True
    while True:
        await asyncio.sleep(seconds)
        if gate.num_inside or is_busy():
            was_busy = True
        elif was_busy or gate.num_entered != seen:
            await asyncio.to_thread(release)
            seen, was_busy, idle, forgotten = gate.num_entered, False, 0.0, False
        elif not forgotten:
            idle += seconds
            if forget_seconds and idle >= forget_seconds:
                await forget()
                gc.collect()  # nodes of the prefix tree refer to one another
                await asyncio.to_thread(release)
                forgotten = True
