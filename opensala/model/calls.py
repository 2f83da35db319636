"""What sequences a call of the model holds: rows with padding left out, or documents packed in one row."""

from array import array
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .layout import SequenceParallel, packed_bounds


@dataclass
class Call:
    """The sequences of a call `[B, T]`.

    Attributes:
        shape: (B, T).
        valid: `[B, T]`, the real tokens; None if all are.
        bounds: boundaries of packed documents, or None.
        positions: `[B, T]` rotary positions that the caller gave, or None.
    """

    shape: tuple[int, int]
    valid: Tensor | None
    bounds: list[int] | None
    positions: Tensor | None

    @classmethod
    def of(
        cls,
        embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        has_cache: bool = False,
        use_cache: bool = False,
        parallel: SequenceParallel | None = None,
    ) -> "Call":
        """The sequences of embeddings `[B, T, W]`; for the other arguments see
        `MiniCPMSALAForCausalLM.forward`.

        Raises:
            ValueError: arguments that do not go together, or a mask of another shape.
        """
        batch, length = embeds.shape[:2]
        if parallel is not None:
            if has_cache or use_cache or attention_mask is not None:
                raise ValueError(
                    "where sequences are split over ranks there is no cache and no padding: pass "
                    "use_cache=False and no attention_mask"
                )
            if cu_seqlens is not None and batch != 1:
                raise ValueError(f"cu_seqlens needs a single row, got {batch}")
            bounds = packed_bounds(None, cu_seqlens, length * parallel.ranks)
            return cls((batch, length), None, bounds, position_ids)
        valid = _valid(attention_mask, batch, length)
        bounds = None
        if cu_seqlens is not None or (not has_cache and position_ids is not None):
            if cu_seqlens is not None and (valid is not None or batch != 1 or has_cache):
                raise ValueError(
                    "cu_seqlens needs a single row without padding and without a cache: pass use_cache=False "
                    "and no attention_mask with zeros"
                )
            bounds = packed_bounds(position_ids, cu_seqlens, length, valid)
        custom = position_ids if not has_cache and attention_mask is None and bounds is None else None
        return cls((batch, length), valid, bounds, custom)

    @property
    def packed(self) -> bool:
        return self.bounds is not None and len(self.bounds) > 2

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each sequence."""
        if self.packed:
            assert self.bounds is not None, "packed documents have bounds"
            return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        return [self.shape[1]] * self.shape[0] if self.valid is None else self.valid.sum(1).tolist()

    @cached_property
    def places(self) -> list[Tensor] | None:
        """Flat places of each row's real tokens in `[B * T]`; None if all tokens are real, in order."""
        if self.valid is None:
            return None
        width = self.shape[1]
        return [n * width + row.nonzero()[:, 0].cpu() for n, row in enumerate(self.valid)]

    def places_of(self, sequence: int) -> Tensor:
        if self.places is not None:
            return self.places[sequence]
        first = sum(self.counts[:sequence])
        return torch.arange(first, first + self.counts[sequence])

    def row_ids(self, ids: Tensor | None) -> list[array] | None:
        """Token ids of each row without its padding."""
        if ids is None:
            return None
        rows = ids if self.valid is None else [row[real] for row, real in zip(ids, self.valid, strict=True)]
        return [array("i", row.tolist()) for row in rows]


def _valid(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Which of the new tokens are real, `[B, T]`; None if all are."""
    if attention_mask is None:
        return None
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if not fits or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be [batch, past + new tokens] = [{batch}, >= {length}] of 0 and 1, "
            f"got shape {list(attention_mask.shape)}"
        )
    valid = attention_mask[:, -length:].bool()
    return None if bool(valid.all()) else valid


def unpacked(made: list[tuple[Tensor | None, list[Tensor]]], like: Tensor) -> list[Tensor]:
    """Packed results `[1, tokens, W]` of a call's steps, each with the places of its tokens, as `[B, T,
    W]`."""
    if len(made) == 1 and made[0][0] is None:
        return [h[0].view(like.shape) for h in made[0][1]]
    whole = [like.new_zeros(like.shape) for _ in made[0][1]] if made else [torch.zeros_like(like)]
    for where, results in made:
        for target, h in zip(whole, results, strict=True):
            target.flatten(0, 1)[where] = h[0]
    return whole
