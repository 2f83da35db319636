"""The ops over pages by the compiled CPU kernels (`ops/native`): every sequence of a call in one C++ call.

Lengths, tables and flags are read where they lie; nothing here loops over sequences. The result of a query
has the same bits whatever else is in the call and however many threads there are.
"""

import math

import torch
from torch import Tensor

from ..native import library
from ..native.tensors import address, kind, plain, threads
from .cpp import REGION_ROWS, SELECT_ROWS, TILE_ROWS
from .pages import KVPages, PageTable
from .spec import BlockSpec


def cpp_store_kv(k: Tensor, v: Tensor, pool: KVPages, table: PageTable, spec: BlockSpec) -> None:
    """As `store_kv`."""
    kept = torch.float32 if pool.is_int8 else pool.keys.dtype  # int8 is made by the kernel
    k, v = (x.detach().to(kept).contiguous() for x in (k, v))
    library().call(
        "opensala_store_kv",
        address(k),
        address(v),
        *map(address, pool),
        kind(pool.keys),
        kind(pool.k1),
        *map(address, table[:3]),
        *table.pages.shape,
        k.shape[1],
        k.shape[2],
        v.shape[2],
        *(stride for x in pool for stride in x.stride()[:3]),
        spec.block_size,
        spec.kernel_stride,
        spec.kernel_size,
        threads(),
    )


def _selection(
    q: Tensor, levels: tuple[Tensor, ...], out: Tensor, table: PageTable, spec: BlockSpec
) -> tuple[object, ...]:
    """What both kinds of selection begin with."""
    return (
        address(q),
        *map(address, levels),
        kind(levels[0]),
        address(out),
        *map(address, table),
        *table.pages.shape,
        q.shape[1],
        levels[0].shape[2],
        q.shape[2],
        *(stride for x in levels for stride in x.stride()[:3]),
        spec.block_size,
        spec.kernel_stride,
        spec.kernel_size,
        spec.init_blocks,
        spec.window_blocks,
        spec.num_blocks,
    )


def cpp_select_paged(
    q: Tensor,
    pool: KVPages,
    table: PageTable,
    spec: BlockSpec,
    scale: float,
    lse: str,
    half_products: bool = False,
) -> Tensor:
    """As `select_blocks_paged` with search="exact"."""
    wide = plain(q)
    out = torch.empty(q.shape[0], pool.keys.shape[2], spec.num_blocks, dtype=torch.int32)
    library().call(
        "opensala_select_paged",
        *_selection(wide, (pool.k1, pool.k2), out, table, spec),
        int(lse == "coarse"),
        scale * math.log2(math.e),
        int(half_products),
        SELECT_ROWS,
        threads(),
    )
    return out


def cpp_select_regions_paged(
    q: Tensor, pool: KVPages, table: PageTable, spec: BlockSpec, scale: float, budget: int
) -> Tensor:
    """As `select_blocks_paged` with search="hierarchical"."""
    wide = plain(q)
    out = torch.empty(q.shape[0], pool.keys.shape[2], spec.num_blocks, dtype=torch.int32)
    library().call(
        "opensala_select_regions_paged",
        *_selection(wide, (pool.k1,), out, table, spec),
        scale * math.log2(math.e),
        budget,
        REGION_ROWS,
        threads(),
    )
    return out


def cpp_paged_attention(
    q: Tensor,
    pool: KVPages,
    table: PageTable,
    blocks: Tensor | None,
    spec: BlockSpec,
    scale: float,
    half_products: bool = False,
) -> Tensor:
    """As `paged_attention`."""
    wide = plain(q)
    listed = None if blocks is None else blocks.to(torch.int32).contiguous()
    out = torch.empty(*q.shape[:2], pool.value_dim, dtype=torch.float32)
    library().call(
        "opensala_attend_paged",
        address(wide),
        address(pool.keys),
        address(pool.values),
        kind(pool.keys),
        address(listed),
        address(out),
        *map(address, table),
        *table.pages.shape,
        q.shape[1],
        pool.keys.shape[2],
        q.shape[2],
        pool.value_dim,
        0 if listed is None else listed.shape[2],
        spec.block_size,
        *pool.keys.stride()[:3],
        *pool.values.stride()[:3],
        scale * math.log2(math.e),
        int(half_products),
        TILE_ROWS,
        threads(),
    )
    return out.to(q.dtype)
