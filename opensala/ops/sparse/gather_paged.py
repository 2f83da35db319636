"""The ops over pages in PyTorch: a sequence is gathered from its pages, the contiguous ops do the rest.

For float64, for machines without a compiler, and as the statement that the fast forms are compared with. It
reads lengths and tables back to Python, and copies what a sequence has cached in every call.

Shapes: T queries of the call, L keys of a sequence, Hkv kv heads, D head dim.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .pages import KVPages, PageTable, window_places
from .spec import BlockSpec, num_windows


class _Sequence(NamedTuple):
    """One sequence of a call: where its new tokens are among the packed ones, its length, pages and mode."""

    new: slice
    length: int
    pages: Tensor
    sparse: bool

    @property
    def cached(self) -> int:
        return self.length - (self.new.stop - self.new.start)


def _sequences(table: PageTable) -> Iterator[_Sequence]:
    """Those with new tokens."""
    bounds = table.cu_seqlens.tolist()
    for n, (length, sparse) in enumerate(zip(table.lengths.tolist(), table.sparse.tolist(), strict=True)):
        if bounds[n + 1] > bounds[n]:
            yield _Sequence(slice(bounds[n], bounds[n + 1]), length, table.pages[n].long(), bool(sparse))


def _token_places(pages: Tensor, first: int, last: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Page number and slot of tokens first ... last - 1."""
    positions = torch.arange(first, last, device=pages.device)
    return pages[positions.div(block_size, rounding_mode="floor")], positions % block_size


def _levels(spec: BlockSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    return (spec.kernel_size, spec.kernel_stride), (spec.coarse_size, spec.coarse_stride)


def _windows_in_order(k: Tensor, size: int, stride: int) -> Tensor:
    """Mean of every full window of k `[L, Hkv, D]`, summed token by token in float32 (float64 for float64).

    The order of the sum is fixed, unlike that of `Tensor.mean`: a window has the same bits however its
    tokens came.
    """
    n = num_windows(k.shape[0], size, stride)
    span = (n - 1) * stride + 1
    total = k[:span:stride].to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    for i in range(1, size):
        total = total + k[i : i + span : stride]
    return (total / size).to(k.dtype)


def gather_store_kv(
    k: Tensor,
    v: Tensor,
    pool: KVPages,
    table: PageTable,
    spec: BlockSpec,
    compress: Callable[[Tensor, int, int], Tensor] = _windows_in_order,
) -> None:
    """As `store_kv`; `compress` makes the windows of `[L, Hkv, D]`."""
    wide = torch.promote_types(pool.k1.dtype, torch.float32)
    for s in _sequences(table):
        places = _token_places(s.pages, s.cached, s.length, spec.block_size)
        pool.keys[places] = pool.packed(k[s.new])
        pool.values[places] = pool.packed(v[s.new])
        for (size, stride), level in zip(_levels(spec), (pool.k1, pool.k2), strict=True):
            old, new = (num_windows(length, size, stride) for length in (s.cached, s.length))
            if new > old:
                page, slot = (x.to(k.device) for x in window_places(old, new, size, stride, spec.block_size))
                ends = (new - 1) * stride + size
                rows = pool.keys[_token_places(s.pages, old * stride, ends, spec.block_size)]
                keys = pool.unpacked(rows, wide if pool.is_int8 else rows.dtype)
                level[s.pages[page], slot] = compress(keys, size, stride).to(level.dtype)


def gather_select(
    q: Tensor, pool: KVPages, table: PageTable, spec: BlockSpec, run: Callable[..., Tensor], *options: object
) -> Tensor:
    """As `select_blocks_paged`: `run(q, k1, k2, length, spec, *options)` for each sparse sequence."""
    result = _no_blocks(q, pool, spec)
    for s in _sequences(table):
        if not s.sparse:
            continue
        levels = []
        for (size, stride), level in zip(_levels(spec), (pool.k1, pool.k2), strict=True):
            n = num_windows(s.length, size, stride)
            page, slot = (x.to(q.device) for x in window_places(0, n, size, stride, spec.block_size))
            levels.append(level[s.pages[page], slot])
        result[s.new] = run(q[s.new], *levels, s.length, spec, *options)
    return result


def naive_select_paged(
    q: Tensor, pool: KVPages, table: PageTable, spec: BlockSpec, run: Callable[..., Tensor], *options: object
) -> Tensor:
    """The same from the keys themselves: `run(q, k, spec, *options)` for each sparse sequence."""
    result = _no_blocks(q, pool, spec)
    for s in _sequences(table):
        if s.sparse:
            rows = pool.keys[_token_places(s.pages, 0, s.length, spec.block_size)]
            result[s.new] = run(q[s.new], pool.unpacked(rows, q.dtype), spec, *options).int()
    return result


def gather_attention(
    q: Tensor,
    pool: KVPages,
    table: PageTable,
    blocks: Tensor | None,
    spec: BlockSpec,
    scale: float,
    run: Callable[..., Tensor],
) -> Tensor:
    """As `paged_attention`: `run(q, k, v, blocks, block_size, scale)` for each sequence."""
    out = q.new_empty(*q.shape[:2], pool.value_dim)
    for s in _sequences(table):
        places = _token_places(s.pages, 0, s.length, spec.block_size)
        k, v = (pool.unpacked(x[places], q.dtype) for x in (pool.keys, pool.values))
        chosen = (
            blocks[s.new] if blocks is not None and s.sparse else _all_blocks(q[s.new], k, spec.block_size)
        )
        out[s.new] = run(q[s.new], k, v, chosen, spec.block_size, scale)
    return out


def _no_blocks(q: Tensor, pool: KVPages, spec: BlockSpec) -> Tensor:
    shape = (q.shape[0], pool.keys.shape[2], spec.num_blocks)
    return torch.full(shape, -1, dtype=torch.int32, device=q.device)


def _all_blocks(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Every block up to the query's own, -1 behind it: `[T, Hkv, blocks]`."""
    length = k.shape[0]
    own = torch.arange(length - q.shape[0], length, device=q.device).div(block_size, rounding_mode="floor")
    block = torch.arange(-(-length // block_size), device=q.device)
    return torch.where(block <= own[:, None], block, -1)[:, None].expand(-1, k.shape[1], -1)
