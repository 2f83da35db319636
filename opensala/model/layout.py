"""How the tokens of one forward call lie: which belong to which sequence, at which position, in which mode.

A call is a rectangle `[B, T]`. Padding (anywhere in a row) and packed documents are described here once,
so that the mixers see whole sequences only. Where rows are split over ranks, it says what of each sequence
lies here, and asks a `SequenceParallel` for the rest. It knows nothing of weights or of how attention is
computed.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .config import MiniCPMSALAConfig
from .layers import rotary_angles


class SequenceParallel(Protocol):
    """The ranks over which rows are split, each holding one of `ranks` stretches of T tokens: what the mixers
    ask of them.

    Every rank must ask the same questions in the same order. `opensala.parallel` answers them with
    collectives.
    """

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """The stretches `[B, T, ...]` of all ranks in order, `[B, ranks * T, ...]`; their gradients return
        summed."""
        ...

    def state_before(
        self, k: Tensor, v: Tensor, slopes: list[float], layout: "SequenceLayout"
    ) -> Tensor | None:
        """The Lightning state `[N, H, D, Dv]` in which each sequence of the layout arrives here; None if all
        begin here.

        k, v are this rank's, packed: `[1, tokens, H, D]` or the rectangle.
        """
        ...


@dataclass(frozen=True)
class SequenceLayout:
    """The sequences of one call.

    Attributes:
        lengths: new tokens of each sequence.
        past: tokens of each sequence already in the cache, or on earlier ranks (0 without either).
        sparse: for each sequence, whether its sparse layers attend sparsely in this call.
        positions: `[B, T]` rotary position of each token (0 at padding).
        index: flat places of the real tokens in `[B * T]`, sequence after sequence; None if all are real
            and every row is one sequence.
        shape: (B, T).
        parallel: the ranks over which rows are split, or None.
        reach: how many ranks back the sequence begins that holds the first token of rank 0, 1, ...; empty
            without ranks.
    """

    lengths: list[int]
    past: list[int]
    sparse: list[bool]
    positions: Tensor
    index: Tensor | None
    shape: tuple[int, int]
    parallel: SequenceParallel | None = None
    reach: tuple[int, ...] = ()
    _angles: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def angles(self, dim: int, config: MiniCPMSALAConfig, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles times `share`, `[B, T, dim / 2]`; computed once for all layers of
        the call."""
        key = dim, share
        if key not in self._angles:
            positions = self.positions if share == 1.0 else self.positions.double() * share
            self._angles[key] = rotary_angles(positions, dim, config.rope_theta, config.rope_scaling)
        return self._angles[key]

    @property
    def rectangular(self) -> bool:
        return self.index is None

    @property
    def cu_seqlens(self) -> Tensor:
        """`[N + 1]` boundaries of the sequences among the packed tokens."""
        present = [n for n in self.lengths if n]  # a row that is all padding is no sequence
        return torch.tensor([0, *present], device=self.positions.device).cumsum(0)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[1, tokens, ...]` without padding (or the rectangle itself)."""
        return x if self.index is None else x.flatten(0, 1)[self.index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Inverse of `pack`; padding becomes zero."""
        if self.index is None:
            return x
        flat = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return flat.index_copy(0, self.index, x[0]).view(*self.shape, *x.shape[2:])

    def split(self, x: Tensor) -> list[Tensor]:
        """One `[1, length, ...]` piece of a packed tensor (or rectangle) for each sequence."""
        if self.index is None:
            return list(x.split(1))
        return list(x.split(self.lengths, 1))

    def split_whole(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`split` of two tensors of the same shape, each piece `[1, past + length, ...]` with its sequence's
        tokens of earlier ranks before it."""
        pieces = list(zip(self.split(k), self.split(v), strict=True))
        if self.parallel is None or not any(self.reach):
            return pieces
        row, here = self.parallel.gather(torch.cat([k, v], -1)), self.parallel.rank * k.shape[1]
        # Every rank takes something from what was gathered, or its part of the backward pass would never run.
        taken = len(pieces) if self.index is None else 1
        whole = [
            row[n : n + 1, here - self.past[n] : here + self.lengths[n]].chunk(2, -1) for n in range(taken)
        ]
        return [(a, b) for a, b in whole] + pieces[taken:]


def packed_bounds(
    position_ids: Tensor | None, cu_seqlens: Tensor | None, length: int, valid: Tensor | None = None
) -> list[int] | None:
    """Boundaries of packed documents in a single row, or None.

    Documents are announced by `cu_seqlens`, or (as transformers' flattening collator does) by
    `position_ids` that fall back to 0. Real tokens are those that `valid` `[B, T]` marks, all if None.

    Raises:
        ValueError: boundaries that do not rise from 0 to the length, documents packed in one of several rows
            or beside padding: they would see each other.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        rising = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
        if not rising or bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(f"cu_seqlens must rise from 0 to {length} (the tokens given), got {bounds}")
        return bounds
    if position_ids is None or length == 1:
        return None
    starts = (position_ids == 0) if valid is None else (position_ids == 0) & valid
    again = starts.sum(1) > 1
    if not bool(again.any()):
        return None
    if position_ids.shape[0] != 1 or valid is not None:
        raise ValueError(
            "position_ids start again at 0 within a row: packed documents need a single row without padding "
            f"(got {position_ids.shape[0]} "
            f"rows{'' if valid is None else ' and an attention_mask with zeros'})"
        )
    found = starts[0].nonzero()[:, 0].tolist()
    if found[0] != 0:
        raise ValueError(f"position_ids of packed documents must begin with 0, got {int(position_ids[0, 0])}")
    return [*found, length]


def documents_layout(bounds: list[int], sparse: list[bool], device: torch.device) -> SequenceLayout:
    """Several documents packed in one row, without cache."""
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    index = torch.arange(bounds[-1], device=device)
    return SequenceLayout(lengths, [0] * len(lengths), sparse, positions, index, (1, bounds[-1]))


def rows_layout(
    shape: tuple[int, int],
    valid: Tensor | None,
    sparse: list[bool],
    device: torch.device,
    position_ids: Tensor | None = None,
) -> SequenceLayout:
    """One sequence per row; `valid` `[B, T]` marks the real tokens, None if all are."""
    batch, length = shape
    past = [0] * batch
    if valid is None:
        positions = torch.arange(length, device=device).expand(batch, length)
        if position_ids is not None:
            positions = position_ids.expand(batch, length)
        return SequenceLayout([length] * batch, past, sparse, positions, None, shape)
    positions = (valid.cumsum(1) - 1).clamp(min=0) * valid
    index = valid.flatten().nonzero()[:, 0]
    return SequenceLayout(valid.sum(1).tolist(), past, sparse, positions, index, shape)


def parallel_layout(
    shape: tuple[int, int],
    bounds: list[int] | None,
    parallel: SequenceParallel,
    sparse: Callable[[list[int]], list[bool]],
    device: torch.device,
    position_ids: Tensor | None = None,
) -> SequenceLayout:
    """This rank's stretch `[B, T]` of rows that are split over ranks.

    Args:
        bounds: boundaries of documents packed in the whole row of ranks * T tokens (B is 1); None: a row is
            one document.
        sparse: from whole lengths of documents to whether each attends sparsely.
        position_ids: `[B, T]` rotary positions of this stretch, if a row is one document.
    """
    batch, length = shape
    bounds = bounds or [0, parallel.ranks * length]
    first, end = parallel.rank * length, (parallel.rank + 1) * length
    reach = tuple(
        -(-(a - bounds[bisect_right(bounds, a) - 1]) // length) for a in range(0, bounds[-1], length)
    )
    documents = [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < end and b > first] * batch
    lengths = [min(b, end) - max(a, first) for a, b in documents]
    past = [max(0, first - a) for a, _ in documents]
    modes = sparse([b - a for a, b in documents])
    packed = len(bounds) > 2
    starts = [torch.arange(p, p + n) for p, n in zip(past, lengths, strict=True)]
    positions = (torch.cat(starts)[None] if packed else starts[0].expand(batch, length)).to(device)
    if position_ids is not None and not packed:
        positions = position_ids.expand(batch, length)
    index = torch.arange(length, device=device) if packed and len(documents) > 1 else None
    return SequenceLayout(lengths, past, modes, positions, index, shape, parallel, reach)
