"""InfLLM-V2: block selection by compressed keys, and attention over the selected blocks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from ..lightning import check_boundaries
from .attend import attend_sequence
from .naive import naive_compress_keys, naive_select_blocks, naive_sparse_attention
from .select import compress, select_sequence
from .spec import BlockSpec, num_windows

__all__ = ["BlockSpec", "compress_keys", "num_windows", "select_blocks", "sparse_attention"]

LSE_KINDS = ("coarse", "exact")


def compress_keys(k: Tensor, kernel_size: int, kernel_stride: int, *, backend: Backend | None = None) -> Tensor:
    """Mean-pool keys over every full window: `[B, L, Hkv, D]` -> `[B, n, Hkv, D]`.

    Window j covers tokens j * kernel_stride ... j * kernel_stride + kernel_size - 1; unfinished windows do
    not exist. Source: InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    if choose_backend("compress_keys", k.device, backend) == "naive":
        return torch.stack([naive_compress_keys(row, kernel_size, kernel_stride) for row in k])
    return compress(k, kernel_size, kernel_stride)


def select_blocks(
    q: Tensor,
    k: Tensor | None,
    spec: BlockSpec,
    *,
    compressed: tuple[Tensor, Tensor] | None = None,
    length: int | None = None,
    scale: float | None = None,
    lse: str = "coarse",
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Choose the key blocks each query attends to. No gradient flows through the choice.

    Args:
        q (Tensor): queries `[B, T, Hq, D]`, the last T positions of each sequence.
        k (Tensor): all keys `[B, L, Hkv, D]`; may be None when `compressed` and `length` are given.
        spec (BlockSpec): sizes of windows and blocks.
        compressed: the two levels `[B, n1, Hkv, D]`, `[B, n2, Hkv, D]` if already at hand (a cache has them).
        length: L, when k is None.
        scale (float): 1/sqrt(D) if None.
        lse: `coarse` takes the softmax denominator from the second level (released model), `exact` from the first.
        cu_seqlens: `[N + 1]` boundaries of documents packed in one row (B = 1, T = L); block numbers then
            count from the start of each document.

    Returns:
        int32 block numbers `[B, T, Hkv, topk + window_size / block_size]`, ascending, padded with -1.

    Raises:
        ValueError: head counts that do not divide, unknown `lse`, missing keys.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1; InfLLM-V2 (arXiv 2509.24663) section 3.
    """
    if lse not in LSE_KINDS:
        raise ValueError(f"lse must be one of {', '.join(LSE_KINDS)}, got {lse!r}")
    if k is None and (compressed is None or length is None):
        raise ValueError("select_blocks needs k, or compressed keys together with length")
    heads = k if k is not None else compressed[0]  # type: ignore[index]
    _check_heads(q, heads)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = choose_backend("select_blocks", q.device, backend)
    with torch.no_grad():
        if cu_seqlens is not None:
            assert k is not None, "packed documents come with their keys"
            return torch.cat(
                [
                    select_blocks(q[:, s], k[:, s], spec, scale=scale, lse=lse, backend=backend)
                    for s in _documents(q, k, cu_seqlens)
                ],
                1,
            )
        if name == "naive":
            if k is None:
                raise ValueError("the naive backend needs k: it compresses the keys itself")
            return torch.stack([naive_select_blocks(a, b, spec, scale, lse).int() for a, b in zip(q, k, strict=True)])
        if compressed is None:
            assert k is not None
            compressed = (compress(k, spec.kernel_size, spec.kernel_stride),
                          compress(k, spec.coarse_size, spec.coarse_stride))
        total = k.shape[1] if k is not None else length
        assert total is not None
        rows = zip(q, compressed[0], compressed[1], strict=True)
        return torch.stack([select_sequence(a, k1, k2, total, spec, scale, lse) for a, k1, k2 in rows])


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    *,
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
        raise ValueError(f"blocks must be [B, T, Hkv, K] = [{q.shape[0]}, {q.shape[1]}, {k.shape[2]}, K], "
                         f"got {list(blocks.shape)}")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = choose_backend("sparse_attention", q.device, backend)
    if cu_seqlens is not None:
        parts = [sparse_attention(q[:, s], k[:, s], v[:, s], blocks[:, s], block_size, scale=scale, backend=backend)
                 for s in _documents(q, k, cu_seqlens)]
        return torch.cat(parts, 1)
    run = naive_sparse_attention if name == "naive" else attend_sequence
    return torch.stack([run(*row, block_size, scale) for row in zip(q, k, v, blocks, strict=True)])


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must be [B, T, Hq, D] and [B, L, Hkv, D], got {list(q.shape)} and {list(k.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide into {k.shape[2]} kv heads")


def _documents(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Iterator[slice]:
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(f"cu_seqlens needs one row with as many queries as keys, got {list(q.shape)}, {list(k.shape)}")
    check_boundaries("cu_seqlens", cu_seqlens, q.shape[1])
    bounds = cu_seqlens.tolist()
    return (slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False))
