"""What differs between the supported versions of transformers.

The model speaks to transformers through public interfaces only: it overrides `generate` and `forward`, and
    its
cache implements what their caches publish. One name differs: the argument that carries the cache is
`past_key_values` up to 5.23 and `cache` from 5.24 on (the old name is deprecated there). Both are taken here;
what is handed on goes by the name that the installed version uses.
"""

import inspect
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache

CACHE_NAMES = ("past_key_values", "cache")
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def take_cache(arguments: dict[str, Any]) -> Any:
    """Remove the cache from keyword arguments and return it, under whichever name it came; None if there is
    none.

    Raises:
        ValueError: two caches, or a cache under a name that nothing here reads: it would be ignored in
            silence.
    """
    given = {name: value for name in CACHE_NAMES if (value := arguments.pop(name, None)) is not None}
    if len(given) > 1:
        raise ValueError(f"give the cache once, as {CACHE_ARGUMENT}; got {' and '.join(given)}")
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise ValueError(
                f"a cache came as {name!r}, which this model does not read (it would answer from an empty "
                "one): "
                f"pass it as {CACHE_ARGUMENT}"
            )
    return next(iter(given.values()), None)
