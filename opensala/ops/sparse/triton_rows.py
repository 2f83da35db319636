# mypy: allow-untyped-defs
"""Where the tokens of a call stand: what the Triton kernels of selection and attention share about lengths
and documents.

The T queries of row b are the last T of its `lengths[b]` tokens, or, for packed documents, every token of the
row. The numbers may live on the GPU and never come to the host, so grids follow from shapes alone and kernels
find out by themselves how much of their range exists.

Packed documents share one storage of derived things (windows, blocks), in which document n owns the slots
from `cu[n] // size + n` on: enough for it whatever its length, and nobody has to sum over documents (see
`find_document`).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, find_document, search_steps

# Numbers that change from call to call. Kernels take them as they come: else a chat would wait for a kernel
# of its own to be compiled whenever one of them is 1, or a multiple of 16 for the first time.
COUNTS = [
    "tokens",
    "sequences",
    "length",
    "per_row",
    "capacity",
    "room",
    "room1",
    "room2",
    "begin",
    "end",
    "origin",
    "words",
    "count",
    "documents",
    "slots",
    "slots2",
    "bins",
    "tiles",
    "none",
    "past_all",
    "new_tokens",
    "keep",
    "shares",
    "splits",
    "rows",
    "outer",
    "inner",
    "step",
]


class Rows(NamedTuple):
    """Lengths of the rows of a call, or boundaries of the documents of its one row.

    Documents with `lengths` are the new tokens of sequences whose keys lie in pages.
    """

    tokens: int  # queries a row
    capacity: int  # keys there is room for
    length: int  # keys of every row, where `lengths` is None
    lengths: Tensor | None  # [B] on the device; [N] with pages
    cu: Tensor | None  # [N + 1] boundaries of packed documents, on the device
    number: Tensor | None  # [T] the document of each token
    pages: Tensor | None = None  # [N, P] page numbers of each sequence
    sparse: Tensor | None = None  # [N] whether a sequence of pages selects blocks

    @property
    def documents(self) -> int:
        return 0 if self.cu is None else self.cu.shape[0] - 1

    @property
    def steps(self) -> int:
        """Halvings to find a document."""
        return search_steps(self.documents)

    @property
    def together(self) -> int:
        """Queries that a tile may expect to find together: of one row, or on average of one sequence."""
        return self.tokens if self.pages is None else cdiv(self.tokens, self.documents)

    @property
    def per_row(self) -> int:
        """Pages of a row of the table."""
        return 0 if self.pages is None else self.pages.shape[1]

    def windows(self, level: Tensor) -> int:
        """Windows there is room for: level is `[B, n, Hkv, D]`, or `[pages, slots, Hkv, D]`."""
        return level.shape[1] * (1 if self.pages is None else self.per_row)

    def slots(self, size: int) -> int:
        """Places for pieces of `size` keys that cover all there is room for, whatever the lengths turn out to
        be."""
        return cdiv(self.capacity, size) if self.cu is None else self.capacity // size + self.documents

    def tiles(self, size: int, begin: int, end: int) -> int:
        """Programs that tiles of `size` queries of [begin, end) may need."""
        if self.cu is None:
            return cdiv(end - begin, size)
        return (end - 1) // size + self.documents - max(begin // size - 1, 0)


def rows_of(q: Tensor, capacity: int, lengths: Tensor | int | None, cu_seqlens: Tensor | None) -> Rows:
    """Put the numbers that describe a call where the kernels can read them, and check those already known
    here.

    Raises:
        ValueError: lengths known on the host that do not fit the queries or the keys.
    """
    tokens = q.shape[1]
    if cu_seqlens is not None:
        cu = cu_seqlens.to(q.device, non_blocking=True)
        token = torch.arange(tokens, device=q.device, dtype=cu.dtype)
        number = (torch.searchsorted(cu, token, right=True) - 1).int()
        return Rows(tokens, capacity, tokens, None, cu, number)
    if lengths is None:
        lengths = capacity
    if not (isinstance(lengths, Tensor) and lengths.is_cuda):
        known = lengths.tolist() if isinstance(lengths, Tensor) else [lengths] * q.shape[0]
        if len(known) != q.shape[0] or min(known) < tokens or max(known) > capacity:
            raise ValueError(
                f"lengths must be {q.shape[0]} numbers from {tokens} (the queries) to {capacity} (the "
                f"keys), got {known}"
            )
    if isinstance(lengths, Tensor):
        return Rows(tokens, capacity, capacity, lengths.to(q.device, non_blocking=True), None, None)
    return Rows(tokens, capacity, lengths, None, None, None)


def inner_contiguous(x: Tensor) -> Tensor:
    """x, copied only if the elements of a head do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def locate(lengths, length, cu, number, b, t, tokens):
    """For token(s) t of row b: the position in its sequence, and where in the row's storage the sequence
    begins."""
    if cu is not None:
        start = tl.load(cu + tl.load(number + t)).to(tl.int64)
        position = t - start
    elif lengths is not None:
        start = t * 0
        position = t + (tl.load(lengths + b).to(tl.int64) - tokens)
    else:
        start = t * 0
        position = t + (length - tokens)
    return position.to(tl.int32), start


@triton.jit
def tile_of(
    lengths, length, cu, documents, index, b, tokens, begin, end, BQ: tl.constexpr, STEPS: tl.constexpr,
    sparse=None,
):  # fmt: skip
    """Tile number `index` of the queries [begin, end): its first query and the query behind its last one, the
    position of its first query, and the number and the first token of its document (0 and 0 without
    documents). Tiles of documents that are not `sparse` are empty."""
    if cu is not None:
        # The first tile that can reach `begin` is at slot begin // BQ - 1: both divisions there may
        # round down.
        n, i = find_document(cu, tl.maximum(begin // BQ - 1, 0) + index, documents, BQ, STEPS)
        start = tl.load(cu + n).to(tl.int64)
        stop = tl.load(cu + n + 1).to(tl.int64)
        first = start + i * BQ
        last = tl.minimum(tl.minimum(first + BQ, stop), end)
        last = tl.where(first + BQ <= begin, first, last)
        if sparse is not None:
            last = tl.where(tl.load(sparse + n) != 0, last, first)
        position = first - start
        if lengths is not None:
            position = first + (tl.load(lengths + n) - stop)
        return first, last, position, n, start
    first = begin + index * BQ
    last = tl.minimum(first + BQ, end)
    if lengths is not None:
        shift = tl.load(lengths + b).to(tl.int64) - tokens
    else:
        shift = first * 0 + (length - tokens)
    return first, last, first + shift, first * 0, first * 0


@triton.jit
def windows_in(length, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Full windows in `length` tokens (integer division rounds towards zero, hence the guard)."""
    return tl.where(length >= SIZE, (length - SIZE) // STRIDE + 1, 0)


@triton.jit
def window_rows(
    window, there, k_p, k_n, pages, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets of windows: one behind another, k_n apart, or in the pages in which they end, k_p apart."""
    if pages is None:
        return window.to(tl.int64) * k_n
    else:
        end = window * STRIDE + (SIZE - 1)
        page = tl.load(pages + end // BLOCK, mask=there, other=0).to(tl.int64)
        return page * k_p + end % BLOCK // STRIDE * k_n


@triton.jit
def phase_rows(
    block, phase, there, k_p, k_n, pages, SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr
):
    """`window_rows` of windows block * RATIO + phase, one phase for all: what depends on it is one number."""
    if pages is None:
        return block.to(tl.int64) * (RATIO * k_n) + phase * k_n
    else:
        end = phase * STRIDE + (SIZE - 1)
        page = tl.load(pages + block + end // (RATIO * STRIDE), mask=there, other=0).to(tl.int64)
        return page * k_p + end % (RATIO * STRIDE) // STRIDE * k_n


@triton.jit
def load_rows(x, offsets, there, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Rows `[n, WIDE]` at the given offsets; zero where `there` is false and beyond DIM."""
    d = tl.arange(0, WIDE)
    mask = there[:, None]
    if DIM < WIDE:
        mask = mask & (d < DIM)[None, :]
    return tl.load(x + offsets[:, None] + d[None, :], mask=mask, other=0.0)


def positive_factor(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and a factor greater than 0, for which factor * q.k are the scores scale * q.k in base 2.

    Kernels take the maximum of a row of q.k before they multiply it, which only such a factor allows.
    """
    if scale == 0:
        return torch.zeros_like(q), 1.0
    return (q if scale > 0 else -q), abs(scale) * math.log2(math.e)


def cores(device: torch.device) -> int:
    """Multiprocessors of a GPU; a token number of them for the interpreter, which runs programs one by
    one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
