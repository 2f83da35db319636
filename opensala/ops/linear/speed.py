"""How fast this machine multiplies with weights of a 16-bit dtype, beside float32: measured, not looked up.

Whether bfloat16 products are 2.7 times faster than float32 (AVX512-BF16) or five times slower (AVX2), and
whether half as many bytes of weights make a single row faster, is a matter of the processor, the version of
torch and the shape. A few products of the model's shapes tell, once for each machine (`kept_times`).
"""

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..native import cache_folder
from ..native.processor import processor_features, processor_name
from . import linear

ROWS = 256  # of the product that stands for reading a prompt
LARGEST = 2048  # of a dimension measured: beyond, rates no longer change, and milliseconds become seconds
STREAMED = 64 << 20  # bytes of float32 weights that a single row is multiplied with: more than caches hold
_REPEATS, _MOST = 7, 100  # turns, at least and at most
_SECONDS = 0.2  # of turns beyond the least number
_VERSION = 3  # of what is kept on disk


@dataclass(frozen=True)
class ProductTimes:
    """Least seconds of products with weights of one shape, all of them float32 in, float32 out.

    Attributes:
        one: a single row, weights stored in float32.
        one_stored: a single row, weights stored in the 16-bit dtype and widened as they are read.
        many: `ROWS` rows in float32, by one thread, as the next one.
        many_half: `ROWS` rows rounded to the 16-bit dtype and multiplied in it.
    """

    one: float
    one_stored: float
    many: float
    many_half: float


def half_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with x rounded to the weights' 16-bit dtype, by torch's own product; in x's dtype.

    Not batch-invariant: torch chooses its blocking by the number of rows.
    """
    return torch.nn.functional.linear(
        x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
    ).to(x.dtype)


@torch.no_grad()
def measure_products(inner: int, outer: int, dtype: torch.dtype) -> ProductTimes:
    """Time products `[rows, inner]` x `[outer, inner]` here and now (some tenths of a second).

    Many rows are multiplied by one thread: with more, a busy machine keeps one waiting for another that does
    not run, and 50 microseconds become 6 ms. Short products get as many turns as there is time.
    """
    inner, outer = min(inner, LARGEST), min(outer, LARGEST)
    copies = max(1, min(64, STREAMED // (4 * inner * outer)))
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(outer, inner, generator=generator) / inner**0.5
    wide = [first.clone() for _ in range(copies)]
    narrow = [w.to(dtype) for w in wide]
    row, rows = (torch.randn(n, inner, generator=generator) for n in (1, ROWS))
    single: dict[str, Callable[[], object]] = {
        "one": lambda: [linear(row, w) for w in wide],
        "one_stored": lambda: [linear(row, w) for w in narrow],
    }
    several: dict[str, Callable[[], object]] = {
        "many": lambda: linear(rows, wide[0]),
        "many_half": lambda: half_product(rows, narrow[0], None),
    }
    least, threads = _least_seconds(single), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        least |= _least_seconds(several)
    finally:
        torch.set_num_threads(threads)
    return ProductTimes(
        least["one"] / copies, least["one_stored"] / copies, least["many"], least["many_half"]
    )


def _least_seconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of each, in turns: what is kept must not be the mood of a busy moment."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    begun = time.perf_counter()
    for turn in range(_MOST + 1):
        if turn > _REPEATS and time.perf_counter() - begun > _SECONDS:
            break
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: min(s) for name, s in seconds.items()}


def kept_times(inner: int, outer: int, dtype: torch.dtype) -> ProductTimes:
    """`measure_products`, measured once for this processor, version of torch and number of threads.

    The outcome is kept in the folder of the compiled kernels, so that a process started later decides alike.
    """
    inner, outer = min(inner, LARGEST), min(outer, LARGEST)
    return _kept(inner, outer, dtype, torch.get_num_threads(), cache_folder())


@functools.cache
def _kept(inner: int, outer: int, dtype: torch.dtype, threads: int, folder: Path) -> ProductTimes:
    machine = [processor_name(), *processor_features(), torch.__version__, str(threads), str(_VERSION)]
    digest = hashlib.sha256("\n".join([*machine, f"{inner}x{outer}", str(dtype)]).encode())
    path = folder / f"products-{digest.hexdigest()[:20]}.json"
    known = _read(path)
    if known is None:
        known = measure_products(inner, outer, dtype)
        _write(path, known)
    return known


def _read(path: Path) -> ProductTimes | None:
    """What is kept there; None if nothing is, or nothing that can be used (it is measured again)."""
    try:
        found = ProductTimes(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    values = asdict(found).values()
    return found if all(isinstance(v, float) and 0 < v < 1e6 for v in values) else None


def _write(path: Path, times: ProductTimes) -> None:
    """Keep it, whole or not at all; where nothing can be written it is measured again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".json.partial")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(times), file)
        os.replace(name, path)
    except OSError:
        return
