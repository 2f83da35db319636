"""InfLLM-V2: block selection by compressed keys, and attention over the selected blocks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import Backend, choose_backend, outside_autocast
from ..checks import check_boundaries, head_dim_limit
from .attend import attend_sequence
from .cpp import cpp_select_by_regions, cpp_select_sequence, cpp_sparse_attention
from .dense import dense_attention
from .hierarchy import select_sequence_by_regions
from .naive import naive_compress_keys, naive_select_blocks, naive_select_regions, naive_sparse_attention
from .paged import paged_attention, select_blocks_paged, store_kv
from .pages import KVPages, PageTable
from .select import compress, select_sequence
from .spec import LSE_KINDS, REGIONS, SEARCHES, BlockSpec, check_search, num_windows
from .ties import exact_ties

__all__ = [
    "LSE_KINDS",
    "SEARCHES",
    "BlockSpec",
    "KVPages",
    "PageTable",
    "compress_keys",
    "dense_attention",
    "exact_ties",
    "extend_compressed",
    "num_windows",
    "paged_attention",
    "select_blocks",
    "select_blocks_paged",
    "sparse_attention",
    "store_kv",
]


def compress_keys(
    k: Tensor, kernel_size: int, kernel_stride: int, *, backend: Backend | None = None
) -> Tensor:
    """Mean-pool keys over every full window: `[B, L, Hkv, D]` -> `[B, n, Hkv, D]`.

    Window j covers tokens j * kernel_stride ... j * kernel_stride + kernel_size - 1; unfinished windows do
    not exist. Gradients flow to k (not with the `triton` backend).
    Source: InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    differentiable = torch.is_grad_enabled() and k.requires_grad
    limit = "it has no gradient" if differentiable else head_dim_limit(k)
    name = choose_backend("compress_keys", k, backend, {"triton": limit})
    if name == "naive":
        return torch.stack([naive_compress_keys(row, kernel_size, kernel_stride) for row in k])
    if name == "torch":
        return compress(k, kernel_size, kernel_stride)
    out = k.new_empty(k.shape[0], num_windows(k.shape[1], kernel_size, kernel_stride), *k.shape[2:])
    extend_compressed(k, out, 0, k.shape[1], kernel_size, kernel_stride, backend=backend)
    return out


def extend_compressed(
    k: Tensor,
    out: Tensor,
    past: Tensor | int,
    new_tokens: int,
    kernel_size: int,
    kernel_stride: int,
    *,
    backend: Backend | None = None,
) -> None:
    """After `new_tokens` keys were put behind the first `past` ones, write the windows they complete into
    `out`.

    Args:
        k (Tensor): key storage `[B, capacity, Hkv, D]`.
        out (Tensor): storage of the compressed keys `[B, windows, Hkv, D]`; modified in place.
        past: keys each row held before, one number or `[B]` integers (which may stay on the GPU: nothing
            waits for them).
        new_tokens: keys each row got.

    Raises:
        ValueError: `out` has no room for the new windows (not checked for numbers on a GPU).
    """
    name = choose_backend("compress_keys", k, backend, {"triton": head_dim_limit(k)})
    if not (isinstance(past, Tensor) and past.is_cuda):
        ends = [p + new_tokens for p in (past.tolist() if isinstance(past, Tensor) else [past])]
        needed = num_windows(max(ends), kernel_size, kernel_stride)
        if out.shape[1] < needed or k.shape[1] < max(ends):
            raise ValueError(
                f"{max(ends)} keys make {needed} windows; k has room for {k.shape[1]} keys, out for "
                f"{out.shape[1]} windows"
            )
    if name == "triton":
        from .triton import triton_extend_compressed

        triton_extend_compressed(k, out, past, new_tokens, kernel_size, kernel_stride)
        return
    for row, before in enumerate(past.tolist() if isinstance(past, Tensor) else [past] * k.shape[0]):
        old, new = (num_windows(n, kernel_size, kernel_stride) for n in (before, before + new_tokens))
        if new > old:
            unfinished = k[row : row + 1, old * kernel_stride : (new - 1) * kernel_stride + kernel_size]
            run = compress if name == "torch" else lambda x, *a: naive_compress_keys(x[0], *a)[None]
            out[row, old:new] = run(unfinished, kernel_size, kernel_stride)[0]


def select_blocks(
    q: Tensor,
    k: Tensor | None,
    spec: BlockSpec,
    *,
    compressed: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | int | None = None,
    scale: float | None = None,
    lse: str = "coarse",
    search: str = "exact",
    regions: int = REGIONS,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Choose the key blocks each query attends to. No gradient flows through the choice.

    Args:
        q (Tensor): queries `[B, T, Hq, D]`, the last T positions of each sequence.
        k (Tensor): all keys `[B, L, Hkv, D]`; may be None when `compressed` and `lengths` are given.
        spec (BlockSpec): sizes of windows and blocks.
        compressed: the two levels `[B, n1, Hkv, D]`, `[B, n2, Hkv, D]` if already at hand (a cache has them);
            windows beyond those of `lengths` are not looked at.
        lengths: keys of each row, `[B]` integers or one number for all; L if None. On a GPU the numbers may
            stay there: nothing waits for them.
        scale (float): 1/sqrt(D) if None.
        lse: `coarse` takes the softmax denominator from the second level (released model), `exact` from the
            first.
        search: `exact` scores every compressed key; `hierarchical` scores regions of 16 blocks and looks only
            into some of them, which costs a twentieth on very long contexts and misses some blocks
            (docs/selection.md).
        regions: how many regions a query looks into when the search is hierarchical; no effect on documents
            that have no more than that (1024 tokens a region in the release).
        cu_seqlens: `[N + 1]` boundaries of documents packed in one row (B = 1, T = L); block numbers then
            count from the start of each document.

    Returns:
        int32 block numbers `[B, T, Hkv, topk + window_size / block_size]`, ascending, padded with -1. Where
        blocks tie exactly at the edge of the choice (neighbours share a window), `cpp` and `torch` decide as
        torch.topk does on a CPU over the blocks the query sees, `triton` takes the lower block number, unless
        inside of `exact_ties`.

    Raises:
        ValueError: head counts that do not divide, unknown `lse` or `search`, too few regions, missing keys.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1; InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    check_search(spec, lse, search, regions)
    if k is None and (compressed is None or lengths is None):
        raise ValueError("select_blocks needs k, or compressed keys together with lengths")
    _check_heads(q, k if k is not None else compressed[0])  # type: ignore[index]
    if cu_seqlens is not None and (k is None or lengths is not None):
        raise ValueError("packed documents (cu_seqlens) come with their keys, not with lengths")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    special = {"cpp": None} if search == "hierarchical" else {"cpp": None, "triton": head_dim_limit(q)}
    name = choose_backend(
        "select_blocks" if search == "exact" else "select_blocks by regions", q, backend, special
    )
    with torch.no_grad(), outside_autocast(q):
        if name == "triton":
            from .triton import triton_select_blocks

            return triton_select_blocks(q, k, spec, compressed, lengths, scale, lse, cu_seqlens)
        if cu_seqlens is not None:
            assert k is not None, "checked above"
            parts = [
                select_blocks(
                    q[:, s],
                    k[:, s],
                    spec,
                    scale=scale,
                    lse=lse,
                    search=search,
                    regions=regions,
                    backend=backend,
                )
                for s in _documents(q, k, cu_seqlens)
            ]
            return torch.cat(parts, 1)
        totals = _row_lengths(lengths, q, k)
        if name == "naive":
            if k is None:
                raise ValueError("the naive backend needs k: it compresses the keys itself")
            pairs = [(a, b[:n]) for a, b, n in zip(q, k, totals, strict=True)]
            if search == "exact":
                return torch.stack([naive_select_blocks(a, b, spec, scale, lse).int() for a, b in pairs])
            return torch.stack([naive_select_regions(a, b, spec, scale, regions).int() for a, b in pairs])
        if compressed is None:
            assert k is not None, "checked above"
            compressed = (
                compress(k, spec.kernel_size, spec.kernel_stride),
                compress(k, spec.coarse_size, spec.coarse_stride),
            )
        pieces = zip(q, *compressed, totals, strict=True)
        if search == "exact":
            run = cpp_select_sequence if name == "cpp" else select_sequence
            return torch.stack([run(*piece, spec, scale, lse) for piece in pieces])
        look = cpp_select_by_regions if name == "cpp" else select_sequence_by_regions
        return torch.stack([look(*piece, spec, scale, regions) for piece in pieces])


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    *,
    lengths: Tensor | int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Causal softmax attention in which each query sees only the keys of its own list of blocks.

    Args:
        q (Tensor): queries `[B, T, Hq, D]`, the last T positions of each sequence.
        k, v (Tensor): `[B, L, Hkv, D]` and `[B, L, Hkv, Dv]`.
        blocks (Tensor): block numbers `[B, T, Hkv, K]`, -1 for none, no number twice in a row; every query
            needs at least one block that is not wholly in its future.
        block_size: tokens a block.
        lengths: keys of each row, `[B]` integers or one number for all; L if None (as in `select_blocks`).
        scale (float): 1/sqrt(D) if None.
        cu_seqlens: `[N + 1]` boundaries of packed documents (B = 1, T = L), block numbers per document.

    Returns:
        `[B, T, Hq, Dv]` in q's dtype. Gradients flow to q, k and v.

    Raises:
        ValueError: head counts that do not divide, or `blocks` of the wrong shape.

    Source: InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    _check_heads(q, k)
    if blocks.shape[:3] != (*q.shape[:2], k.shape[2]):
        raise ValueError(
            f"blocks must be [B, T, Hkv, K] = [{q.shape[0]}, {q.shape[1]}, {k.shape[2]}, K], "
            f"got {list(blocks.shape)}"
        )
    if cu_seqlens is not None and lengths is not None:
        raise ValueError("give packed documents (cu_seqlens) or lengths, not both")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = choose_backend("sparse_attention", q, backend, {"cpp": None, "triton": head_dim_limit(q, v)})
    if name == "triton":
        from .triton import triton_sparse_attention

        return triton_sparse_attention(q, k, v, blocks, block_size, lengths, scale, cu_seqlens)
    if cu_seqlens is not None:
        parts = [
            sparse_attention(
                q[:, s], k[:, s], v[:, s], blocks[:, s], block_size, scale=scale, backend=backend
            )
            for s in _documents(q, k, cu_seqlens)
        ]
        return torch.cat(parts, 1)
    run = {"naive": naive_sparse_attention, "torch": attend_sequence, "cpp": cpp_sparse_attention}[name]
    pieces = zip(q, k, v, blocks, _row_lengths(lengths, q, k), strict=True)
    with outside_autocast(q):
        return torch.stack([run(a, b[:n], c[:n], chosen, block_size, scale) for a, b, c, chosen, n in pieces])


def _row_lengths(lengths: Tensor | int | None, q: Tensor, k: Tensor | None) -> list[int]:
    """Keys of each row, checked against the queries and the keys there are."""
    if lengths is None:
        assert k is not None, "checked by the caller"
        lengths = k.shape[1]
    totals = lengths.tolist() if isinstance(lengths, Tensor) else [lengths] * q.shape[0]
    most = max(totals) if k is None else k.shape[1]
    if len(totals) != q.shape[0] or min(totals) < q.shape[1] or max(totals) > most:
        raise ValueError(
            f"lengths must be {q.shape[0]} numbers from {q.shape[1]} (the queries) to {most} (the keys), "
            f"got {totals}"
        )
    return totals


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must be [B, T, Hq, D] and [B, L, Hkv, D], got {list(q.shape)} and {list(k.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide into {k.shape[2]} kv heads")


def _documents(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Iterator[slice]:
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"cu_seqlens needs one row with as many queries as keys, got {list(q.shape)}, {list(k.shape)}"
        )
    check_boundaries("cu_seqlens", cu_seqlens, q.shape[1])
    bounds = cu_seqlens.tolist()
    return (slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False))
