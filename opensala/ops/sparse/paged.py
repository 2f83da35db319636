"""Block selection and attention of several sequences at once, whose keys and values lie in pages.

The sequences of a call differ in length, in new tokens (a chunk of a prompt, one generated token) and in
mode; a `PageTable` says which tokens and pages are whose. No gradients: training has the contiguous ops.
"""

import math

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from ..lightning import head_dim_limit
from .attend import attend_sequence
from .cpp_paged import cpp_paged_attention, cpp_select_paged, cpp_select_regions_paged, cpp_store_kv
from .gather_paged import gather_attention, gather_select, gather_store_kv, naive_select_paged
from .hierarchy import select_sequence_by_regions
from .naive import naive_compress_keys, naive_select_blocks, naive_select_regions, naive_sparse_attention
from .pages import KVPages, PageTable, check_pool, check_table
from .select import select_sequence
from .spec import REGIONS, BlockSpec, check_search

_INT8 = "keys and values in int8 have no Triton form"


def store_kv(
    k: Tensor, v: Tensor, pool: KVPages, table: PageTable, spec: BlockSpec, *, backend: Backend | None = None
) -> None:
    """Write the new tokens' keys and values into their pages, and the compressed keys that they complete.

    Args:
        k, v (Tensor): `[T, Hkv, D]` and `[T, Hkv, Dv]`, rounded to the pool's dtype (int8: see `int8`).
        pool (KVPages): the layer's pages; modified in place.
        table (PageTable): which token goes where. Its numbers are trusted (`PageTable.check_integrity`).
        spec (BlockSpec): sizes of windows and blocks.

    A compressed key has the same bits however the tokens were cut into calls: the windows are summed token
        by token
    from what the pages hold. On a GPU they are the same on one machine: the order of the sum is fixed there
        too, but is another one.

    Raises:
        ValueError: tensors that do not fit together.

    Source: InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    _check(pool, table, spec)
    for name, x, dim in (("k", k, pool.k1.shape[3]), ("v", v, pool.value_dim)):
        wanted = (k.shape[0], pool.keys.shape[2], dim)
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{name} must be [T, Hkv, D] = {list(wanted)} as in the pool, got {list(x.shape)}"
            )
    limit = _INT8 if pool.is_int8 else head_dim_limit(pool.keys, pool.values)
    name = choose_backend("store_kv", pool.k1, backend, {"cpp": None, "triton": limit})
    with torch.no_grad():
        if name == "triton":
            from .triton_store import triton_store_kv  # needs the package triton

            triton_store_kv(k, v, pool, table, spec)
        elif name == "cpp":
            cpp_store_kv(k, v, pool, table, spec)
        elif name == "naive":
            gather_store_kv(k, v, pool, table, spec, naive_compress_keys)
        else:
            gather_store_kv(k, v, pool, table, spec)


def select_blocks_paged(
    q: Tensor,
    pool: KVPages,
    table: PageTable,
    spec: BlockSpec,
    *,
    scale: float | None = None,
    lse: str = "coarse",
    search: str = "exact",
    regions: int = REGIONS,
    half_products: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Choose the key blocks that each query of the sparse sequences attends to.

    Args:
        q (Tensor): queries `[T, Hq, D]` of the new tokens, which are stored already.
        pool (KVPages): the layer's pages.
        table (PageTable): the sequences of the call. Its numbers are trusted (`PageTable.check_integrity`).
        spec (BlockSpec): sizes of windows and blocks.
        scale (float): 1/sqrt(D) if None.
        lse, search, regions: as in `select_blocks`.
        half_products: where compressed keys are bfloat16 and the processor multiplies it faster
            (AVX512-BF16), `cpp` may round the queries of an exact search to it too, but for single tokens.

    Returns:
        int32 block numbers `[T, Hkv, topk + window_size / block_size]`, counted from the start of each
        sequence, ascending, padded with -1; rows of dense sequences are -1. With `cpp` a row does not depend
        on the rest of the call, nor on the number of threads.

    Raises:
        ValueError: tensors that do not fit together, unknown `lse` or `search`, too few regions.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1; InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    check_search(spec, lse, search, regions)
    _check(pool, table, spec, q)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    special = {"cpp": None, "triton": head_dim_limit(q)}
    op = "select_blocks_paged"
    if search != "exact":
        op = "select_blocks_paged by regions"
        special["triton"] = "hierarchical search has no Triton form: search='exact' has one"
    name = choose_backend(op, _widest(q, pool), backend, special)
    with torch.no_grad():
        if name == "triton":
            from .triton_select import triton_select_paged  # needs the package triton

            return triton_select_paged(q, pool, table, spec, scale, lse)
        if name == "cpp" and search == "exact":
            return cpp_select_paged(q, pool, table, spec, scale, lse, half_products)
        if name == "cpp":
            return cpp_select_regions_paged(q, pool, table, spec, scale, regions)
        how = lse if search == "exact" else regions
        if name == "naive":
            plain = naive_select_blocks if search == "exact" else naive_select_regions
            return naive_select_paged(q, pool, table, spec, plain, scale, how)
        run = select_sequence if search == "exact" else select_sequence_by_regions
        return gather_select(q, pool, table, spec, run, scale, how)


def paged_attention(
    q: Tensor,
    pool: KVPages,
    table: PageTable,
    blocks: Tensor | None,
    spec: BlockSpec,
    *,
    scale: float | None = None,
    half_products: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Causal softmax attention of the new tokens, over listed blocks or, in dense sequences, all the past.

    Args:
        q (Tensor): queries `[T, Hq, D]` of the new tokens, which are stored already.
        pool (KVPages): the layer's pages.
        table (PageTable): the sequences of the call. Its numbers are trusted (`PageTable.check_integrity`).
        blocks (Tensor): block numbers `[T, Hkv, K]` as `select_blocks_paged` gives them; rows of dense
            sequences are not looked at. None: all sequences attend densely.
        spec (BlockSpec): its block_size is that of the pages.
        scale (float): 1/sqrt(D) if None.
        half_products: where keys and values are bfloat16 and the processor multiplies it faster
            (AVX512-BF16), `cpp` may round queries and softmax weights to it too, but for single tokens; sums
            are float32.

    Returns:
        `[T, Hq, Dv]` in q's dtype. With `cpp` a row has the same bits whatever else is in the call, however
        the sequence was cut into calls, and however many threads there are.
        With `triton` they may differ: shapes decide whether sparse sequences go query by query or page by
        page, and dense ones query by query or in tiles of queries (`triton_paged`).

    Raises:
        ValueError: tensors that do not fit together.

    Source: InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    _check(pool, table, spec, q)
    if blocks is not None and blocks.shape[:2] != (q.shape[0], pool.keys.shape[2]):
        raise ValueError(
            f"blocks must be [T, Hkv, K] = [{q.shape[0]}, {pool.keys.shape[2]}, K], got {list(blocks.shape)}"
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    special = {"cpp": None, "triton": _INT8 if pool.is_int8 else head_dim_limit(q, pool.values)}
    name = choose_backend("paged_attention", _widest(q, pool), backend, special)
    with torch.no_grad():
        if name == "triton":
            from .triton_paged import triton_paged_attention  # needs the package triton

            return triton_paged_attention(q, pool, table, blocks, spec, scale)
        if name == "cpp":
            return cpp_paged_attention(q, pool, table, blocks, spec, scale, half_products)
        run = naive_sparse_attention if name == "naive" else attend_sequence
        return gather_attention(q, pool, table, blocks, spec, scale, run)


def _widest(q: Tensor, pool: KVPages) -> Tensor:
    """The tensor whose dtype decides about the backend: one in float64 needs PyTorch."""
    return pool.k1 if pool.k1.dtype == torch.float64 else q


def _check(pool: KVPages, table: PageTable, spec: BlockSpec, q: Tensor | None = None) -> None:
    check_pool(pool, spec)
    check_table(table)
    if q is None:
        return
    kv_heads, dim = pool.k1.shape[2:]
    if q.dim() != 3 or q.shape[2] != dim or q.shape[1] % kv_heads:
        raise ValueError(f"q must be [T, a multiple of {kv_heads} heads, {dim}], got {list(q.shape)}")
