"""The cache that transformers hands to the model: rows of a batch over pages and slots.

It is an adapter. Pages of keys and values and slots of states are those of `CacheStorage`; who holds which is
counted by `opensala.cache.Pool`, so that rows, forks and snapshots share what they have in common, and a page
is copied when one of its holders goes on writing. A forward call writes its states into fresh slots and
`commit` puts them in place, so that an interrupted call leaves the cache as it was.

Rows of a batch may have different lengths: each row is stored from its own first real token.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .advance import Advance
from .batch import BatchRow, ForwardBatch
from .config import MiniCPMSALAConfig
from .rows import Piece, Row, Rows, RowStore, copy_row
from .storage import CacheStorage, text_bytes

_FIRST = 1024  # tokens per row


@dataclass
class _Call:
    """What an unfinished call has taken: nothing of it counts before `commit`."""

    written: list[int]  # the slot of each row's states so far, -1 for one that has not moved
    recorded: list[tuple[list[Piece], dict[int, tuple[Tensor, Tensor]]]]


@dataclass(eq=False)
class Snapshot:
    """A point a cache can return to, at any time: it holds the pages and states it needs."""

    lengths: list[int]
    padded_length: int
    announced: list[int] | None
    held: Rows


class SALACache(Cache):
    """The cache of a MiniCPM-SALA model; pass it to `forward` or `generate` as `past_key_values` (or
    `cache`).

    `begin_prompt` announces a prompt that will come in several calls: its whole length decides between dense
    and sparse attention, so that the answer does not depend on how the prompt is cut, and room for it is
    made once. What comes behind an announced prompt is taken for generated: each token's own length decides.
    Without an announcement each call is taken for a whole prompt or turn (or a decoding step).

    Args:
        config: the model's configuration.
        record_past: keep what `crop` needs to undo tokens of the last call (speculative decoding).
    """

    def __init__(self, config: MiniCPMSALAConfig, *, record_past: bool = False) -> None:
        super().__init__(layers=[])
        self.config, self.record_past = config, record_past
        # tokens of the rectangle seen, padding included: what transformers calls the length
        self.padded_length = 0
        self._store = RowStore(config)
        self._held = Rows(self._store, [])
        self._announced: list[int] | None = None
        self._reserve = 0
        self._prompt = 0  # tokens of the rectangle that `generate` announced
        self._call: _Call | None = None
        self._before: Rows | None = None  # the rows before the last call, if it was recorded
        self._recorded: list[tuple[list[Piece], dict[int, tuple[Tensor, Tensor]]]] = []

    def __repr__(self) -> str:
        return f"SALACache(lengths={self.lengths}, bytes={self.num_bytes()})"

    @property
    def rows(self) -> list[Row]:
        return self._held.rows

    @property
    def storage(self) -> CacheStorage | None:
        """Where pages and states lie; None before the first token."""
        return self._store.storage

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [row.length for row in self.rows]

    # --- prompts ---

    def begin_prompt(self, lengths: list[int], new_tokens: int = 0) -> None:
        """Announce that row b will grow by `lengths[b]` prompt tokens, then by up to `new_tokens` generated
        ones.

        Raises:
            ValueError: another number of rows than the cache holds.
        """
        self._check_rows(len(lengths))
        past = self.lengths or [0] * len(lengths)
        self._announced = [a + b for a, b in zip(past, lengths, strict=True)]
        self._reserve = max(self._announced) + new_tokens

    def announce(
        self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, new_tokens: int
    ) -> None:
        """`begin_prompt` for what `generate` is given: ids `[B, T]` or embeddings `[B, T, hidden]`, and a
        mask.

        The rows may be repeated afterwards (beams, several answers): the announcement is repeated with them.

        Raises:
            ValueError: the cache holds all of the prompt, so that there is no token left to predict from, or
                other tokens than its beginning.
        """
        given = ids if ids is not None else embeds
        if given is None:
            return
        batch, length = given.shape[:2]
        whole = length if mask is None else max(length, mask.shape[1])
        if whole <= self.padded_length:
            raise ValueError(
                f"the cache already holds {self.padded_length} tokens and the prompt has {whole}: give the "
                "whole text, "
                "at least one token longer than what the cache holds"
            )
        if ids is not None and length == whole:
            self._check_beginning(ids, mask)
        if mask is not None:
            new = [int(n) for n in mask[:, self.padded_length :].sum(1).tolist()]
        else:
            new = [whole - self.padded_length] * batch
        self.begin_prompt(new, new_tokens)
        self._prompt = whole

    def _check_beginning(self, ids: Tensor, mask: Tensor | None) -> None:
        for n, row in enumerate(self.rows[: ids.shape[0]]):
            if row.ids is None:
                continue
            past = ids[n, : self.padded_length]
            past = past if mask is None else past[mask[n, : self.padded_length].bool()]
            if past.tolist() != list(row.ids):
                raise ValueError(
                    f"row {n} of the cache holds other tokens than the beginning of the prompt: use a "
                    "cache of this "
                    "text, or a fresh one"
                )

    def plan(self, counts: Sequence[int]) -> list[list[Piece]]:
        """Cut a call that brings `counts[b]` tokens to row b into steps, each row of each in one mode.

        More than one step only where generated tokens cross `dense_len` within a call (speculative decoding).
        """
        announced = self._announced
        if announced is not None and len(announced) != len(counts):  # beams, several answers
            if len(counts) % len(announced):
                raise ValueError(
                    f"a prompt of {len(announced)} rows was announced, the call has {len(counts)}"
                )
            announced = [n for n in announced for _ in range(len(counts) // len(announced))]
            self._announced = announced
        past = self.lengths or [0] * len(counts)
        steps: list[list[Piece]] = []
        for n, (start, count) in enumerate(zip(past, counts, strict=True)):
            end = None if announced is None else announced[n]
            for i, (offset, size, sparse) in enumerate(self._modes(start, count, end)):
                if i == len(steps):
                    steps.append([])
                steps[i].append(Piece(n, offset, size, sparse))
        return steps

    def _modes(self, start: int, count: int, announced: int | None) -> list[tuple[int, int, bool]]:
        """Runs `(offset, count, sparse)` of the tokens start ... start + count - 1."""
        decide, end, runs = self.config.attends_sparsely, start + count, []
        prompt = end if announced is None else min(end, announced)
        if prompt > start:
            runs.append((0, prompt - start, decide(max(prompt, announced or 0))))
        behind = max(start, prompt)
        if behind < end:
            turn = min(
                max(self.config.dense_len - 1, behind), end
            )  # from here on a token's own length is sparse
            cuts = [behind, turn, end] if decide(behind + 1) != decide(end) else [behind, end]
            runs += [(a - start, b - a, decide(b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        return runs

    # --- a forward call ---

    def begin_call(self, batch: int, padded_length: int) -> None:
        """Start a forward call of `[batch, padded_length]` tokens.

        Raises:
            ValueError: another number of rows than the cache holds; the whole of a prompt of which it holds a
                part.
        """
        self._check_rows(batch)
        if 0 < self.padded_length < self._prompt <= padded_length:
            raise ValueError(
                f"{self._prompt - self.padded_length} tokens of the prompt are left to read and "
                f"{padded_length} came: "
                "what the "
                "cache holds would be read twice (this version of transformers is not supported)"
            )
        self.discard()
        if not self.rows:
            self._held = Rows(self._store, [Row() for _ in range(batch)])
        self._call = _Call([-1] * batch, [])

    def step(
        self,
        pieces: list[Piece],
        like: Tensor,
        devices: Sequence[torch.device],
        positions: Tensor | None = None,
    ) -> ForwardBatch:
        """The batch of one step of `plan`, with room made for its tokens; activations are like `like`."""
        assert self._call is not None, "begin_call comes first"
        storage = self._make_room(pieces, like.dtype, devices)
        rows = []
        for piece in pieces:
            row, written = self.rows[piece.row], self._call.written[piece.row]
            if written < 0:  # the row's own slot stays as it is until the call is done
                read, written = row.slot, self._store.slots.take()[0]
                self._call.written[piece.row] = written
            else:
                read = written
            # a copy: a view would keep the array from being cut
            pages, start = np.array(row.pages, np.int32), row.length + piece.offset
            rows.append(BatchRow(pages, start, piece.count, piece.sparse, read, written))
        batch = ForwardBatch.of(storage, rows, like.device, positions=positions, record=self.record_past)
        if batch.recorded is not None:
            self._call.recorded.append((pieces, batch.recorded))
        return batch

    def _make_room(
        self, pieces: list[Piece], dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> CacheStorage:
        size, store = self.config.block_spec.block_size, self._store
        ends = {p.row: self.rows[p.row].length + p.offset + p.count for p in pieces}
        reserve = max(self._reserve, 0)
        exact = reserve >= max(ends.values())
        wanted = 0
        for n, end in ends.items():
            tokens = reserve if exact else max(end, _FIRST)
            wanted += max(0, -(-tokens // size) - len(self.rows[n].pages)) + 1  # 1: a page to copy
        storage = store.reserve(wanted, len(pieces), exact, dtype, devices)
        copies = []
        for n, end in ends.items():
            row = self.rows[n]
            last = len(row.pages) - 1
            partial = row.length % size and row.length // size == last
            if partial and store.pages.references(row.pages[last]) > 1:
                fresh = store.pages.take()[0]
                copies.append((row.pages[last], fresh))
                store.pages.release([row.pages[last]])
                row.pages[last] = fresh
            row.pages.extend(store.pages.take(max(0, -(-end // size) - len(row.pages))))
        storage.copy_pages(copies)
        return storage

    def commit(self, counts: Sequence[int], padded_length: int, ids: Sequence[array] | None) -> None:
        """Make the changes of a finished call valid: `counts[b]` tokens for row b, whose ids (if known) are
        `ids[b]`."""
        assert self._call is not None, "begin_call comes first"
        call, self._call = self._call, None
        before = Rows(self._store, [copy_row(row) for row in self.rows]) if self.record_past else None
        for n, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            if call.written[n] >= 0:
                self._store.slots.release([row.slot] if row.slot >= 0 else [])
                row.slot = call.written[n]
            row.length += count
            row.ids = None if ids is None or row.ids is None else row.ids + ids[n]
        if self._before is not None:
            self._before.close()
        self._before, self._recorded = before, call.recorded
        self.padded_length += padded_length
        if self._reserve and max(self.lengths) > self._reserve:
            self._reserve = 0

    def discard(self) -> None:
        """Forget the changes of a call that did not finish."""
        if self._call is None:
            return
        self._store.slots.release(slot for slot in self._call.written if slot >= 0)
        self._call = None
        size = self.config.block_spec.block_size
        for row in self.rows:
            self._trim(row, -(-row.length // size))
        if not self.padded_length:
            self._held = Rows(self._store, [])

    def _trim(self, row: Row, pages: int) -> None:
        self._store.pages.release(row.pages[pages:])
        del row.pages[pages:]

    def _check_rows(self, batch: int) -> None:
        if self.rows and len(self.rows) != batch:
            raise ValueError(
                f"the cache holds {len(self.rows)} rows, but the call has {batch}: use one cache per batch"
            )

    def check_config(self, config: MiniCPMSALAConfig) -> None:
        """ValueError if this is the cache of a model that keeps other things."""
        mine, other = (_shape(c) for c in (self.config, config))
        different = [name for name in mine if mine[name] != other[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"the cache was made for another model: its {name} is {mine[name]}, this model's is "
                f"{other[name]}; "
                "make one with SALACache(model.config)"
            )

    # --- what transformers asks of a cache ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.padded_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.padded_length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.padded_length > 0

    @property
    def batch_size(self) -> int:
        return len(self.rows) or -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.rows)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False throughout: a prompt is cut to what the cache lacks, which transformers does not do for
        purely linear caches."""
        return [False] * self.config.num_hidden_layers

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.config.num_hidden_layers

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can undo tokens of the last call: only with recording on."""
        return self.record_past or not any(
            not self.config.is_sparse(i) for i in range(self.config.num_hidden_layers)
        )

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("SALACache is filled by the model's own layers, not through update()")

    def reset(self) -> None:
        """Forget everything, keeping the object and its memory."""
        self.discard()
        self._put(Rows(self._store, []), 0, None)

    def _put(self, held: Rows, padded_length: int, announced: list[int] | None) -> None:
        """Take over rows that are held already in place of those there are."""
        self._held.close()
        self._held, self.padded_length, self._announced = held, padded_length, announced
        self._reserve = self._prompt = 0
        if self._before is not None:
            self._before.close()
        self._before, self._recorded = None, []

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Undo the last tokens of every row: `crop(-n)` removes n, as transformers counts.

        Lightning states cannot be run backwards. It works for everything (all tokens), for nothing (0), and,
        with `record_past=True`, for any part of the last call of a batch without padding in it. Otherwise
        ValueError, and the cache is unchanged: take a `snapshot` at points you want to return to.
        """
        tokens_to_remove = int(tokens_to_remove)  # prompt lookup of transformers 5.17 brings a tensor
        if tokens_to_remove > 0 or -tokens_to_remove > self.padded_length:
            raise ValueError(
                f"crop takes {-self.padded_length} (all tokens held) to 0, got {tokens_to_remove}: "
                "crop(-n) removes the last n tokens"
            )
        if tokens_to_remove == 0:
            return
        removed = -tokens_to_remove
        if removed == self.padded_length:
            self.reset()
            return
        before = self._before
        if before is None or any(
            now.length - old.length < removed for now, old in zip(self.rows, before.rows, strict=True)
        ):
            why = (
                "the last call was shorter" if self.record_past and before is not None else "recording is off"
            )
            raise ValueError(
                f"cannot undo {removed} tokens: a lightning state cannot be run backwards, and {why}. "
                "Make the "
                "cache with record_past=True to undo tokens of the last call, or take a snapshot() where "
                "you want "
                "to return to"
            )
        self._roll_back(before, removed)

    def _roll_back(self, before: Rows, removed: int) -> None:
        """Run the states from before the last call over the tokens of it that stay."""
        size, store = self.config.block_spec.block_size, self._store
        for n, (row, old) in enumerate(zip(self.rows, before.rows, strict=True)):
            kept = row.length - removed - old.length
            store.slots.release([row.slot])
            row.slot = old.slot
            if not kept:
                store.slots.share([row.slot] if row.slot >= 0 else [])
            else:
                row.slot = self._replay(n, old.slot, kept)
            row.length -= removed
            row.ids = None if row.ids is None else row.ids[: row.length]
            self._trim(row, -(-row.length // size))
        self.padded_length -= removed
        if self._announced is not None:
            self._announced = [min(a, n) for a, n in zip(self._announced, self.lengths, strict=True)]

    def _replay(self, row: int, slot: int, kept: int) -> int:
        """A slot with the states behind the first `kept` recorded tokens of a row, begun with those of
        `slot`."""
        storage = self._store.reserve(0, 1, True, torch.float32, None)
        target = self._store.slots.take()[0]
        where: dict[torch.device, Advance] = {}
        for layer, states in storage.states.items():
            keys, values = [], []
            for pieces, recorded in self._recorded:
                first = 0
                for piece in pieces:
                    if piece.row == row:
                        part = slice(first, first + max(0, min(piece.count, kept - piece.offset)))
                        keys.append(recorded[layer][0][part])
                        values.append(recorded[layer][1][part])
                    first += piece.count
            k, v = torch.cat(keys), torch.cat(values)
            if k.device not in where:
                where[k.device] = Advance.of(self.config, k.device, [slot], [target], [kept])
            where[k.device].run(k, v, states)
        return target

    def _select_rows(self, rows: list[int]) -> None:
        held = Rows(self._store, [copy_row(self.rows[r]) for r in rows])
        announced = None if self._announced is None else [self._announced[r] for r in rows]
        self._put(held, self.padded_length, announced)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row beam_idx[b] as the new row b (beam search)."""
        self._select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows([n for n in range(len(self.rows)) for _ in range(repeats)])

    # --- ours ---

    def snapshot(self) -> Snapshot:
        """A point to `restore` later; it shares pages and states, nothing is copied."""
        held = Rows(self._store, [copy_row(row) for row in self.rows])
        return Snapshot(self.lengths, self.padded_length, self._announced, held)

    def restore(self, point: Snapshot) -> None:
        """Go back to a snapshot of this cache or of one it was forked from, exactly.

        Raises:
            ValueError: a snapshot of another cache.
        """
        if point.held.store is not self._store:
            raise ValueError(
                f"the snapshot (rows of {point.lengths} tokens) was taken from another cache: restore it "
                "there"
            )
        self.discard()
        held = Rows(self._store, [copy_row(row) for row in point.held.rows])
        self._put(held, point.padded_length, point.announced)

    def fork(self) -> "SALACache":
        """A cache that goes on from here by itself; both share what they have in common."""
        twin = SALACache(self.config, record_past=self.record_past)
        twin._store = self._store
        twin._held = Rows(self._store, [copy_row(row) for row in self.rows])
        twin.padded_length, twin._announced = self.padded_length, self._announced
        return twin

    def num_bytes(self, allocated: bool = False) -> int:
        """Bytes the tokens held occupy, or, with `allocated`, bytes set aside for them (and for forks)."""
        storage = self._store.storage
        if storage is None:
            return 0
        if allocated:
            return storage.num_bytes
        return sum(text_bytes(self.config, row.length, storage.dtype, storage.kv_dtype) for row in self.rows)


def _shape(config: MiniCPMSALAConfig) -> dict[str, Any]:
    """What a cache is made for."""
    return {
        "mixer_types": config.mixer_types,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "lightning_nh": config.lightning_nh,
        "lightning_head_dim": config.lightning_head_dim,
        "sparse_config": config.sparse_config,
    }
