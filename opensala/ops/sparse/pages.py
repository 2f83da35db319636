"""Keys and values in pages: what one call of several sequences reads and writes.

A page holds one selection block of one layer, with the compressed keys whose windows end in it: what a page
holds depends on nothing behind it, so that it can be shared, dropped or saved by itself. Who owns which page
is not known here.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from .int8 import SCALE_BYTES, pack_rows, unpack_rows
from .spec import BlockSpec


class PageTable(NamedTuple):
    """The N sequences of one call, their T new tokens packed; made once, used by all layers.

    Attributes:
        cu_seqlens: int32 `[N + 1]`, boundaries of the new tokens of each sequence.
        lengths: int32 `[N]`, tokens of each sequence, the new ones included (they are the last).
        pages: int32 `[N, P]`, page numbers in order of the sequence; what lies behind the first
            ceil(length / block_size) is never read.
        sparse: int32 `[N]`, 1 for a sequence that attends to selected blocks, 0 for one that attends to all
            its past.
    """

    cu_seqlens: Tensor
    lengths: Tensor
    pages: Tensor
    sparse: Tensor

    def check_integrity(self, tokens: int, num_pages: int, block_size: int) -> None:
        """Check the numbers themselves, which the ops trust (reading them waits for a GPU).

        Args:
            tokens: new tokens of the call, T.
            num_pages: pages there are.
            block_size: tokens per page.

        Raises:
            ValueError: boundaries that decrease or do not end at T, fewer keys than new tokens, too narrow a
                table, a page that does not exist, or a page that is written to and in use twice.
        """
        bounds, lengths = self.cu_seqlens.tolist(), self.lengths.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens:
            raise ValueError(f"cu_seqlens must go from 0 to the {tokens} tokens of the call, got {bounds}")
        users: Counter[int] = Counter()
        written: list[int] = []
        for n, (a, b, length) in enumerate(zip(bounds, bounds[1:], lengths, strict=False)):
            if not 0 <= b - a <= length:
                raise ValueError(
                    f"sequence {n} must have 0 to lengths[{n}] = {length} new tokens, got {b - a}"
                )
            needed = -(-length // block_size)
            row = self.pages[n, :needed].tolist()
            if len(row) < needed or not all(0 <= page < num_pages for page in row):
                raise ValueError(
                    f"pages[{n}] must list {needed} pages from 0 to {num_pages - 1} for its {length} "
                    f"tokens, got {row}"
                )
            users.update(row)
            written += row[(length - (b - a)) // block_size :] if b > a else []
        shared = [page for page in written if users[page] > 1]
        if shared:
            raise ValueError(f"pages {shared} are written to, so they may be in use only once: copy them")


class KVPages(NamedTuple):
    """The pages of one sparse layer, all of one dtype; stride 1 in the last dimension.

    Keys and values may be int8 instead, in rows of D + 4 and Dv + 4 bytes (see `int8`); compressed keys are
    made from what such rows stand for, and are never int8.

    Attributes:
        keys, values: `[pages, block_size, Hkv, D]` and `[pages, block_size, Hkv, Dv]`.
        k1: `[pages, ceil(block_size / kernel_stride), Hkv, D]`, first-level compressed keys. The window that
            ends at token e of its sequence lies in the page of e, in slot (e % block_size) // kernel_stride.
        k2: `[pages, ceil(block_size / coarse_stride), Hkv, D]`, the second level, likewise.
    """

    keys: Tensor
    values: Tensor
    k1: Tensor
    k2: Tensor

    @property
    def is_int8(self) -> bool:
        return self.keys.dtype == torch.int8

    @property
    def value_dim(self) -> int:
        """Width of a value, Dv."""
        return self.values.shape[-1] - (SCALE_BYTES if self.is_int8 else 0)

    def packed(self, x: Tensor) -> Tensor:
        """Keys or values `[..., D]` as rows of the pool."""
        return pack_rows(x) if self.is_int8 else x.to(self.keys.dtype)

    def unpacked(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the pool as keys or values `[..., D]` in a dtype."""
        return unpack_rows(rows, dtype) if self.is_int8 else rows.to(dtype)


def window_places(first: int, last: int, size: int, stride: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Where windows first ... last - 1 of a level lie: which page of the sequence, and the slot in it."""
    ends = torch.arange(first, last) * stride + (size - 1)
    return ends.div(block_size, rounding_mode="floor"), (ends % block_size).div(stride, rounding_mode="floor")


def check_pool(pool: KVPages, spec: BlockSpec) -> None:
    """Shapes and layout of a pool.

    Raises:
        ValueError: tensors that do not fit together or the spec.
    """
    pages, _, kv_heads = pool.keys.shape[:3]
    dim, scale = pool.k1.shape[-1], SCALE_BYTES if pool.is_int8 else 0
    slots1, slots2 = (-(-spec.block_size // stride) for stride in (spec.kernel_stride, spec.coarse_stride))
    wanted = {
        "keys": (pages, spec.block_size, kv_heads, dim + scale),
        "values": (pages, spec.block_size, kv_heads, pool.values.shape[-1]),
        "k1": (pages, slots1, kv_heads, dim),
        "k2": (pages, slots2, kv_heads, dim),
    }
    compressed = pool.k1.dtype if pool.is_int8 else pool.keys.dtype
    dtypes = (pool.keys.dtype, pool.keys.dtype, compressed, compressed)
    for (name, shape), x, dtype in zip(wanted.items(), pool, dtypes, strict=True):
        if tuple(x.shape) != shape or x.dtype != dtype or x.stride(-1) != 1:
            raise ValueError(
                f"pool.{name} must be {list(shape)} in {dtype} with stride 1 in the last "
                f"dimension, got {list(x.shape)} in {x.dtype} with strides {list(x.stride())}"
            )


def check_table(table: PageTable) -> None:
    """Shapes, dtypes and layout of a table; the numbers in it are checked by `check_integrity`.

    Raises:
        ValueError: tensors that do not fit together.
    """
    n = table.lengths.shape[0]
    width = table.pages.shape[-1]
    for name, shape in {"cu_seqlens": (n + 1,), "lengths": (n,), "pages": (n, width), "sparse": (n,)}.items():
        x = getattr(table, name)
        if tuple(x.shape) != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(
                f"table.{name} must be contiguous int32 {list(shape)}, got {x.dtype} {list(x.shape)}"
            )
