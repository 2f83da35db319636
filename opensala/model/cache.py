"""What a model remembers of the tokens it has read, for both kinds of layer.

A sparse layer keeps K and V of every token and two levels of compressed keys; a lightning layer keeps one
float32 state. Rows of a batch may have different lengths: each row is stored from its own first real token.
A forward call stages its changes and `commit` makes them valid at once, so that an interrupted call leaves
the cache as it was. It knows nothing of how attention is computed.

Shapes: B rows, L tokens, Hkv kv heads, D head dim, n windows.
"""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..ops import BlockSpec, alibi_slopes, extend_compressed
from ..ops.sparse import num_windows
from .config import MiniCPMSALAConfig

_GROWTH = 1.5
_FIRST = 256  # tokens


class _Store:
    """A `[B, capacity, Hkv, D]` tensor that grows along tokens by a constant factor, keeping its contents."""

    def __init__(self) -> None:
        self.data: Tensor | None = None

    def reserve(self, like: Tensor, batch: int, needed: int, exact: bool = False) -> Tensor:
        """Make room for `needed` tokens in each row and return the storage."""
        old = self.data
        if old is not None and old.shape[1] >= needed:
            return old
        capacity = (
            needed
            if exact
            else max(needed, _FIRST, math.ceil(_GROWTH * (0 if old is None else old.shape[1])))
        )
        with torch.inference_mode(
            False
        ):  # usable inside and outside of inference mode, whichever comes first
            new = torch.empty(batch, capacity, *like.shape[2:], dtype=like.dtype, device=like.device)
        if old is not None:
            new[:, : old.shape[1]] = old
        self.data = new
        return new

    def select(self, rows: Tensor) -> None:
        if self.data is not None:
            self.data = self.data.index_select(0, rows.to(self.data.device))

    @property
    def token_bytes(self) -> int:
        return 0 if self.data is None else self.data[0, :1].numel() * self.data.element_size()

    @property
    def allocated(self) -> int:
        return 0 if self.data is None else self.data.numel() * self.data.element_size()


class SparseCacheLayer:
    """K, V and the two levels of compressed keys of one sparse layer."""

    is_compileable = False
    is_croppable = True

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec
        self.keys, self.values, self.k1, self.k2 = _Store(), _Store(), _Store(), _Store()

    def append(
        self, row: int, batch: int, past: int, k: Tensor, v: Tensor, reserve: int
    ) -> tuple[Tensor, ...]:
        """Put k, v `[1, T, Hkv, D]` behind the first `past` tokens of a row and extend its compressed keys.

        Returns K, V `[1, past + T, Hkv, D]` and both levels of compressed keys `[1, n, Hkv, D]`, as views.
        """
        end = past + k.shape[1]
        room = max(end, reserve)
        exact = reserve >= end
        keys = self.keys.reserve(k, batch, room, exact)
        values = self.values.reserve(v, batch, room, exact)
        keys[row, past:end] = k[0]
        values[row, past:end] = v[0]
        levels = []
        for store, size, stride in (
            (self.k1, self.spec.kernel_size, self.spec.kernel_stride),
            (self.k2, self.spec.coarse_size, self.spec.coarse_stride),
        ):
            data = store.reserve(k, batch, max(1, num_windows(room, size, stride)), exact)
            extend_compressed(keys[row : row + 1], data[row : row + 1], past, k.shape[1], size, stride)
            levels.append(data[row : row + 1, : num_windows(end, size, stride)])
        return keys[row : row + 1, :end], values[row : row + 1, :end], *levels

    def used_bytes(self, lengths: list[int]) -> int:
        spec, total = self.spec, 0
        for length in lengths:
            total += length * (self.keys.token_bytes + self.values.token_bytes)
            total += num_windows(length, spec.kernel_size, spec.kernel_stride) * self.k1.token_bytes
            total += num_windows(length, spec.coarse_size, spec.coarse_stride) * self.k2.token_bytes
        return total

    def allocated_bytes(self) -> int:
        return sum(s.allocated for s in self._stores())

    def select(self, rows: Tensor) -> None:
        for store in self._stores():
            store.select(rows)

    def _stores(self) -> tuple[_Store, ...]:
        return self.keys, self.values, self.k1, self.k2


class LightningCacheLayer:
    """The recurrent state `[B, H, D, Dv]` (float32) of one lightning layer, and what a rollback needs.

    With recording on, the keys and values of the last call are kept beside the state before it, so that the
    state after any of that call's tokens can be computed again.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, heads: int) -> None:
        self.state: Tensor | None = None
        self.staged: Tensor | None = None
        self.record: tuple[Tensor | None, Tensor, Tensor] | None = None  # state before, k, v of the last call
        self._staged_record: tuple[Tensor | None, Tensor, Tensor] | None = None
        self._slopes = alibi_slopes(heads)

    def stage(self, state: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> None:
        self.staged = state.detach()
        self._staged_record = None if k is None or v is None else (self.state, k.detach(), v.detach())

    def commit(self) -> None:
        if self.staged is not None:
            self.state, self.record = self.staged, self._staged_record
        self.staged = self._staged_record = None

    def discard(self) -> None:
        self.staged = self._staged_record = None

    def can_drop(self, tokens: int) -> bool:
        return self.record is not None and tokens <= self.record[1].shape[1]

    def drop(self, tokens: int) -> None:
        """Go back by `tokens` within the recorded call."""
        assert self.record is not None and self.can_drop(tokens), "checked by the cache"
        before, k, v = self.record
        kept = k.shape[1] - tokens
        k, v = k[:, :kept], v[:, :kept]
        decay = torch.tensor(self._slopes, device=k.device, dtype=torch.float32)
        steps = torch.arange(kept - 1, -1, -1, device=k.device)
        weights = torch.exp(-decay * steps[:, None])[None, :, :, None]
        state = torch.einsum("bthd,bthe->bhde", k.float() * weights, v.float())
        if before is not None:
            state = state + torch.exp(-decay * kept)[None, :, None, None] * before
        self.state, self.record = state, (before, k, v)

    def used_bytes(self) -> int:
        return 0 if self.state is None else self.state.numel() * self.state.element_size()

    def select(self, rows: Tensor) -> None:
        rows = rows if self.state is None else rows.to(self.state.device)
        if self.state is not None:
            self.state = self.state.index_select(0, rows)
        if self.record is not None:
            before, k, v = self.record
            self.record = (
                None if before is None else before.index_select(0, rows),
                k.index_select(0, rows),
                v.index_select(0, rows),
            )


@dataclass(eq=False)
class Snapshot:
    """A point a cache can return to: lengths and recurrent states. Keys and values stay where they are, so it
    holds until the cache is cut back below it, reordered or reset (`valid` turns False)."""

    lengths: list[int]
    columns: int
    announced: list[int]
    states: list[Tensor | None]
    valid: bool = True


class SALACache(Cache):
    """The cache of a MiniCPM-SALA model; pass it to `forward` or `generate` as `past_key_values`.

    `begin_prompt` announces a prompt that will come in several calls: its whole length decides between dense
    and sparse attention, so that the answer does not depend on how the prompt is cut, and room for it is
    made once. Without an announcement each call is taken for a whole prompt (or a decoding step).

    Args:
        config: the model's configuration.
        record_past: keep what `crop` needs to undo tokens of the last call (speculative decoding).
    """

    def __init__(self, config: MiniCPMSALAConfig, *, record_past: bool = False) -> None:
        self.config = config
        assert config.lightning_nh is not None, "filled by the configuration"
        layers = [
            SparseCacheLayer(config.block_spec)
            if config.is_sparse(i)
            else LightningCacheLayer(config.lightning_nh)
            for i in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self.record_past = record_past
        self.lengths: list[int] = []  # real tokens of each row
        self.columns = 0  # tokens of the rectangle seen, padding included: what transformers calls the length
        self._announced: list[int] = []
        self._reserve = 0
        self._points: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"SALACache(lengths={self.lengths}, bytes={self.num_bytes()})"

    def begin_prompt(self, lengths: list[int], new_tokens: int = 0) -> None:
        """Announce that row b will grow by `lengths[b]` prompt tokens, then by up to `new_tokens` more.

        Raises ValueError if the number of rows differs from the rows already held.
        """
        past = self.lengths or [0] * len(lengths)
        self._check_rows(len(lengths))
        self._announced = [a + b for a, b in zip(past, lengths, strict=True)]
        self._reserve = max(self._announced) + new_tokens

    def announce(
        self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, new_tokens: int
    ) -> None:
        """`begin_prompt` for what `generate` is given: token ids `[B, T]` or embeddings `[B, T, hidden]`, and
        a mask.

        The rows may be repeated afterwards (beams, several answers): the announcement is repeated with them.

        Raises:
            ValueError: the cache holds all of the prompt, so that there is no token left to predict from.
        """
        given = ids if ids is not None else embeds
        if given is None:
            return
        batch, length = given.shape[:2]
        whole = length if mask is None else max(length, mask.shape[1])
        if whole <= self.columns:
            raise ValueError(
                f"the cache already holds {self.columns} tokens and the prompt has {whole}: give the "
                "whole text, "
                "at least one token longer than what the cache holds"
            )
        if mask is not None:
            new = [int(n) for n in mask[:, self.columns :].sum(1).tolist()]
        else:
            new = [whole - self.columns] * batch
        self.begin_prompt(new, new_tokens)

    def past_lengths(self, batch: int) -> list[int]:
        """Tokens held for each of `batch` rows; ValueError if the cache holds another number of rows."""
        self._check_rows(batch)
        return list(self.lengths) or [0] * batch

    def decisive_lengths(self, ends: list[int]) -> list[int]:
        """The lengths that decide between dense and sparse when a call ends at `ends`."""
        announced = self._announced or [0] * len(ends)
        if len(announced) != len(ends) and len(ends) % len(announced) == 0:  # beams, several answers
            announced = [n for n in announced for _ in range(len(ends) // len(announced))]
            self._announced = announced
        return [max(a, b) for a, b in zip(announced, ends, strict=True)]

    @property
    def reserve(self) -> int:
        """Tokens a row is known to grow to; 0 if unknown."""
        return self._reserve

    def commit(self, new_lengths: list[int], columns: int) -> None:
        """Make the changes of a finished forward call valid."""
        for layer in self.layers:
            if isinstance(layer, LightningCacheLayer):
                layer.commit()
        self.lengths = [a + b for a, b in zip(self.past_lengths(len(new_lengths)), new_lengths, strict=True)]
        self.columns += columns
        if not self._reserve or max(self.lengths) > self._reserve:
            self._reserve = 0

    def discard(self) -> None:
        """Forget the changes of a forward call that did not finish."""
        for layer in self.layers:
            if isinstance(layer, LightningCacheLayer):
                layer.discard()

    def _check_rows(self, batch: int) -> None:
        if self.lengths and len(self.lengths) != batch:
            raise ValueError(
                f"the cache holds {len(self.lengths)} rows, but the call has {batch}: use one cache a batch"
            )

    # --- what transformers asks of a cache ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.columns > 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths) or -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.lengths)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can undo tokens of the last call: only with recording on."""
        return self.record_past or not any(isinstance(x, LightningCacheLayer) for x in self.layers)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("SALACache is filled by the model's own layers, not through update()")

    def reset(self) -> None:
        """Forget everything, keeping the object."""
        self._forget_points(-1)
        fresh = SALACache(self.config, record_past=self.record_past)
        self.__dict__.update(fresh.__dict__)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Undo the last tokens of every row: `crop(-n)` removes n, as transformers counts.

        Lightning states cannot be run backwards. It works for everything (all tokens), for nothing (0), and,
        with `record_past=True`, for any part of the last call of a batch without padding in it. Otherwise
        ValueError, and the cache is unchanged: take a `snapshot` at points you want to return to.
        """
        tokens_to_remove = int(tokens_to_remove)  # prompt lookup of transformers 5.17 brings a tensor
        if tokens_to_remove > 0 or -tokens_to_remove > self.columns:
            raise ValueError(
                f"crop takes {-self.columns} (all tokens held) to 0, got {tokens_to_remove}: "
                "crop(-n) removes the last n tokens"
            )
        if tokens_to_remove == 0:
            return
        if -tokens_to_remove == self.columns:
            self.reset()
            return
        removed = -tokens_to_remove
        lightning = [x for x in self.layers if isinstance(x, LightningCacheLayer)]
        if not all(layer.can_drop(removed) for layer in lightning):
            raise ValueError(
                f"cannot undo {removed} tokens: a lightning state cannot be run backwards, and "
                f"{'the last call was shorter' if self.record_past else 'recording is off'}. Make the "
                "cache with "
                "record_past=True to undo tokens of the last call, or take a snapshot() where you want to "
                "return to"
            )
        for layer in lightning:
            layer.drop(removed)
        self.columns -= removed
        self._forget_points(self.columns)
        self.lengths = [n - removed for n in self.lengths]
        self._announced = [min(a, n) for a, n in zip(self._announced, self.lengths, strict=False)]

    def _select_rows(self, rows: Tensor) -> None:
        self._forget_points(-1)
        for layer in self.layers:
            layer.select(rows)
        picked = rows.tolist()
        self.lengths = [self.lengths[r] for r in picked]
        self._announced = [self._announced[r] for r in picked] if self._announced else []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row beam_idx[b] as the new row b (beam search)."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    # --- ours ---

    def snapshot(self) -> Snapshot:
        """A point to `restore` later; costs one reference to each recurrent state and no copy of keys or
        values."""
        states = [x.state if isinstance(x, LightningCacheLayer) else None for x in self.layers]
        point = Snapshot(list(self.lengths), self.columns, list(self._announced), states)
        self._points.add(point)
        return point

    def restore(self, point: Snapshot) -> None:
        """Go back to a snapshot of this cache, exactly. ValueError if it cannot be gone back to."""
        if point not in self._points or not point.valid:
            raise ValueError(
                f"the snapshot (rows of {point.lengths} tokens) was taken from another cache, or this one "
                "has been "
                "cut back below it, reordered or reset since: take a new one"
            )
        self._forget_points(point.columns)
        self.lengths, self.columns, self._announced = (
            list(point.lengths),
            point.columns,
            list(point.announced),
        )
        self._reserve = 0
        for layer, state in zip(self.layers, point.states, strict=True):
            if isinstance(layer, LightningCacheLayer):
                layer.state, layer.record = state, None

    def _forget_points(self, columns: int) -> None:
        """The tokens behind `columns` will be overwritten: snapshots that hold more are void."""
        for point in self._points:
            point.valid = point.valid and point.columns <= columns

    def fork(self) -> "SALACache":
        """An independent copy: both can go on from here without seeing each other."""
        twin = SALACache(self.config, record_past=self.record_past)
        twin.lengths, twin.columns = list(self.lengths), self.columns
        twin._announced = list(self._announced)
        longest = max(self.lengths, default=0)
        for mine, other in zip(self.layers, twin.layers, strict=True):
            if isinstance(mine, SparseCacheLayer):
                for a, b in zip(mine._stores(), other._stores(), strict=True):
                    if a.data is not None:
                        b.data = a.data[:, :longest].clone()
            elif mine.state is not None:
                other.state = mine.state.clone()
        return twin

    def num_bytes(self, allocated: bool = False) -> int:
        """Bytes the tokens held occupy, or, with `allocated`, bytes set aside for them."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, SparseCacheLayer):
                total += layer.allocated_bytes() if allocated else layer.used_bytes(self.lengths)
            else:
                total += layer.used_bytes()
        return total
