"""Places for a context that is far longer than memory holds."""

from dataclasses import replace

from ..engine import Engine
from ..engine.memory import cache_budget
from ..model.storage import compressed_bytes
from . import context


def with_room(engine: Engine, tokens: int, host_memory: int | None) -> Engine:
    """An engine of the same model that can read a context of so many tokens, or have it open, while main
    memory holds `host_memory` bytes of its keys and values; the engine itself where its pool has places
    enough, or without a bound.

    A page that lies on disk takes its compressed keys and no more. Pages that lie nowhere else (questions,
    answers, and while a text is read the segment to come, with the copy that is written) get the rest of the
    memory, so that no more can be taken than there is.

    Raises:
        ValueError: there is not so much memory: what is needed, what there is, what to change.
    """
    size, pool = engine.config.block_spec.block_size, engine.scheduler.pages.size
    pages = -(-tokens // size)
    alone = 2 * min(context.SEGMENT_PAGES, pages) + -(-engine.options.max_batch_tokens // size) + 1
    if host_memory is None or engine.device.type != "cpu" or pool >= pages + alone:
        return engine
    memory = engine.options.memory_bytes or cache_budget(engine.device, engine.config, engine.dtype, 0)
    fixed = host_memory + pages * compressed_bytes(engine.config, engine.dtype, engine.kv_dtype)
    fixed += engine.scheduler.slots.size * engine.sizes.slot
    others = (memory - fixed) // engine.sizes.page
    if others < alone:
        raise ValueError(
            f"{tokens:,} tokens with {host_memory:,} bytes of their keys and values in memory need "
            f"{fixed + alone * engine.sizes.page:,} bytes, and there are {memory:,} for texts: allow less "
            "host memory, free some, or shorten the documents"
        )
    bounds = replace(
        engine.options, host_memory=host_memory, max_cached_tokens=(pages + min(others, pool)) * size
    )
    return Engine(engine.model, engine.tokenizer, bounds, name=engine.name)
