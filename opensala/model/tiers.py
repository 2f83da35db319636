"""Keys and values on several tiers of memory: device, host and disk.

Compressed keys always lie where the model runs: blocks are chosen by them alone. Of keys and values a layer
needs those of the chosen blocks, and they are brought up just before it attends to them: from segments on
disk into the pool in main memory, and from there, where there is a device tier, into its frames. What was
brought stays, up to each tier's budget; then the least recently wanted pages give way. Budgets are kept:
where the queries of a step want more than a tier holds, they attend in pieces, which changes no bit of a
result.

The pool in main memory holds everything that is not on disk: new keys and values are written through to it,
so that a page never has to be carried down to make room. With a model on a device but no device tier, the
pool is on the device.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..cache.frames import Frames
from ..ops import KVPages, PageTable
from .advice import give_back, in_small_pieces
from .batch import BatchRow
from .device_frames import Allocate, DeviceFrames, Write, page_table
from .prefetch import Prefetcher, Source
from .storage import CacheStorage
from .traffic import Counter, Traffic, describe, stats

Piece = tuple[slice, KVPages, PageTable]
_AHEAD = 8  # one part in so many of the host's budget is for pages that are read ahead
_AHEAD_ALWAYS = 64  # such pages where there is no budget
_ONCE = 256  # queries of a layer, at most, whose choice says what the next token will choose


class Tiers:
    """See the module.

    Args:
        storage: the pool; its keys and values are the host tier.
        sequences: that may be in a step, for the least that a budget must hold.
        device_memory: bytes of keys and values in the device tier; None for none.
        allocate: makes the memory of the device tier.

    Attributes:
        counter: what was read from disk.
        traffic, device_traffic: of host and device tier.
        copied: bytes of pages that were copied up to the device tier.

    Raises:
        ValueError: a device tier that does not hold what one token wants.
    """

    def __init__(
        self,
        storage: CacheStorage,
        sequences: int,
        device_memory: int | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        self.storage, self.counter, self.sequences = storage, Counter(), sequences
        self.traffic, self.device_traffic, self.copied = Traffic(), Traffic(), 0
        self.layers = list(storage.kv)
        self._row = {layer: n for n, layer in enumerate(self.layers)}
        self.host = Frames(len(self.layers), storage.num_pages, None)
        self._sources: dict[int, tuple[Source, int]] = {}  # by page of the pool
        self._last: dict[int, np.ndarray] = {}  # pages that each layer wanted last
        self._rows: list[BatchRow] = []
        self._complete = False
        self.page_size = storage.config.block_spec.block_size
        self.ahead = Prefetcher(self.page_bytes // 2, 0)
        self._budget: int | None = None
        self._bytes = {
            n: _pool_bytes(pool) for n, pool in storage.kv.items() if pool.keys.device.type == "cpu"
        }
        self.device: DeviceFrames | None = None
        if device_memory is not None:
            assert allocate is not None, "someone makes the frames"
            self.device = DeviceFrames(self, device_memory, allocate)

    @property
    def page_bytes(self) -> int:
        """Keys and values of a page in one layer."""
        pool = self.storage.kv[self.layers[0]]
        return sum(x[0].numel() * x.element_size() for x in (pool.keys, pool.values))

    # --- budgets ---

    @property
    def budget(self) -> int | None:
        """Bytes of keys and values in the pool that also lie on disk; None for no bound."""
        return self._budget

    @budget.setter
    def budget(self, budget: int | None) -> None:
        ahead, limit = _AHEAD_ALWAYS, None
        if budget is not None:
            if self.device is None and not self._bytes:
                raise ValueError("host memory is bounded on a GPU only with a bound of device memory")
            pages = budget // self.page_bytes
            ahead = pages // _AHEAD
            limit = pages - ahead
            self.check("host memory", limit, self.page_bytes)
        self._budget, self.ahead.room, self.host.limit = budget, ahead, limit
        self._give_back(self.host.shrink())

    def check(self, what: str, frames: int, frame_bytes: int) -> None:
        """Refuse a tier of so many frames if a step can need more at a time: the pages that new tokens reach
        back into, in one layer, or what one token attends to.

        Raises:
            ValueError: what is needed, what there is, what to change.
        """
        needed = self.least
        if frames < needed:
            part = _AHEAD / (_AHEAD - 1) if what == "host memory" else 1
            raise ValueError(
                f"{what} for keys and values: one step needs {needed:,} pages of {frame_bytes:,} bytes at a "
                f"time, and {frames:,} are allowed: allow at least "
                f"{int(needed * part + 1) * frame_bytes:,} bytes, or fewer sequences at a time"
            )

    @property
    def least(self) -> int:
        """Pages of one layer that a tier must be able to hold at a time."""
        config, spec = self.storage.config, self.storage.config.block_spec
        reached = self.sequences * (self._back + 2)
        attended = (config.num_key_value_heads or 1) * spec.num_blocks
        dense = config.dense_len if config.attention_mode == "auto" else 0
        return min(max(reached, attended, -(-dense // spec.block_size)), self.storage.num_pages)

    def check_prompt(self, tokens: int) -> None:
        """Refuse a text of so many tokens whose dense attention wants more pages than a tier holds.

        Raises:
            ValueError: what is needed, what there is, what to change.
        """
        config = self.storage.config
        limits = {"host": self.host.limit, "device": self.device.frames.limit if self.device else None}
        if config.attends_sparsely(tokens):
            return
        needed = -(-tokens // config.block_spec.block_size)
        for what, limit in limits.items():
            if limit is not None and needed > limit:
                raise ValueError(
                    f"{tokens:,} tokens attend densely: a layer needs {needed:,} pages of "
                    f"{self.page_bytes:,} bytes at a time, and {what} memory holds {limit:,}: allow "
                    "more, or use attention_mode auto"
                )

    @property
    def _back(self) -> int:
        """Pages before its own that a new token's windows reach back into."""
        spec = self.storage.config.block_spec
        return -(-spec.coarse_size // spec.block_size)

    # --- what lies on disk ---

    @property
    def num_absent(self) -> int:
        """Pages of the pool that lack something."""
        return int(((self.host.of < 0) & self.host.bound).any(0).sum())

    @property
    def resident_bytes(self) -> int:
        """Keys and values that came from disk and are in memory."""
        return self.host.count * self.page_bytes

    def expect(self, pages: Sequence[int], sources: Sequence[tuple[Source, int]]) -> None:
        """Note that these pages' keys and values lie in segments, in all layers."""
        for page in pages:
            self.forget(page)
        self.host.bound[list(pages)] = True
        self._sources.update(zip(pages, sources, strict=True))

    def on_disk(self, pages: Sequence[int]) -> np.ndarray:
        """Of each page, whether its keys and values lie in a segment."""
        return self.host.bound[list(pages)]

    def hand_over(self, pages: Sequence[int], sources: Sequence[tuple[Source, int]]) -> None:
        """Note that pages which were computed here, and will not change any more, lie in segments now: they
        may give way from now on. Between two steps."""
        self.host.bound[list(pages)] = True
        self._sources.update(zip(pages, sources, strict=True))
        for row in range(len(self.layers)):
            self.host.put(row, np.array(pages, np.int64))
        self._give_back(self.host.shrink())

    def forget(self, page: int) -> None:
        """Nobody holds this page any longer."""
        if self.device is not None:
            self.device.frames.drop(page)
        if self._sources.pop(page, None) is not None:
            self.host.drop(page)
            self.ahead.forget(page, self.layers)

    def keep(self, pages: Sequence[int]) -> None:
        """Fill these pages for good, as if they had been computed here: their files may go.

        Raises:
            DamagedContext: see `bring`.
        """
        step = max(1, (self.host.limit or len(pages) * len(self.layers)) // len(self.layers))
        for first in range(0, len(pages), step):
            self.bring(pages[first : first + step])
            for page in pages[first : first + step]:
                self.forget(page)

    def hint(self, pages: Sequence[int]) -> None:
        """Let the disk begin with what is sure to be wanted."""
        wanted = np.array(pages, np.int64)
        wanted = wanted[self.host.bound[wanted]]
        for row, layer in enumerate(self.layers):
            self._hint(layer, wanted[self.host.of[row, wanted] < 0].tolist())

    def _hint(self, layer: int, pages: Sequence[int]) -> None:
        """The same, of pages on disk; neighbours in one file are one request."""
        runs: list[tuple[Source, int, int]] = []
        for page in pages:
            source, index = self._sources[page]
            if runs and runs[-1][0] is source and runs[-1][1] + runs[-1][2] == index:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((source, index, 1))
        for source, index, count in runs:
            source.hint(layer, index, count)

    # --- up to the host ---

    def bring(self, pages: Sequence[int] | np.ndarray, layer: int | None = None) -> None:
        """Fill these pages of the pool, of one layer or of all; together, in all these layers, they must fit
        into the budget.

        Raises:
            DamagedContext: what lies on disk is not what was written.
        """
        wanted = np.unique(np.asarray(pages, np.int64))
        wanted = wanted[self.host.bound[wanted]]
        if not len(wanted):
            return
        for one in self.layers if layer is None else (layer,):
            missing = self.host.want(self._row[one], wanted)
            self.traffic.hits += len(wanted) - len(missing)
            self.traffic.misses += len(missing)
            if len(missing):
                self._give_back(self.host.make_room(len(missing)))
                self._read(one, missing.tolist())

    def _read(self, layer: int, pages: list[int]) -> None:
        ready = {page: self.ahead.take(layer, page) for page in pages}
        self._hint(layer, [page for page, data in ready.items() if data is None])
        done = 0
        try:
            for page, data in ready.items():
                self._fill(layer, page, data)
                done += 1
        finally:  # a damaged page, and those behind it, stay absent
            self.host.put(self._row[layer], np.array(pages[:done], np.int64))

    def _fill(self, layer: int, page: int, data: np.ndarray | None) -> None:
        source, index = self._sources[page]
        if layer in self._bytes:
            keys, values = (x[page] for x in self._bytes[layer])
        else:
            keys, values = (np.empty(self.page_bytes // 2, np.uint8) for _ in range(2))
        if data is None:
            source.read_page(layer, index, keys.data, values.data)
        else:
            keys[:], values[:] = data
        if layer not in self._bytes:
            pool = self.storage.kv[layer]
            for target, found in ((pool.keys, keys), (pool.values, values)):
                target[page].copy_(torch.from_numpy(found).view(target.dtype).view(target.shape[1:]))

    def _give_back(self, gone: list[tuple[int, int]]) -> None:
        for row, page in gone:
            pool = self.storage.kv[self.layers[row]]
            give_back(pool.keys[page])
            give_back(pool.values[page])
        self.traffic.evictions += len(gone)

    def read(self, layer: int, pages: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of keys and values of some pages, on the CPU.

        Raises:
            DamagedContext: see `bring`.
        """
        pool, step = self.storage.kv[layer], max(1, self.host.limit or len(pages))
        parts: list[list[Tensor]] = [[], []]
        for first in range(0, len(pages), step):
            some = list(pages[first : first + step])
            self.bring(some, layer)
            where = torch.tensor(some, device=pool.keys.device)
            for part, x in zip(parts, (pool.keys, pool.values), strict=True):
                part.append(x.index_select(0, where).cpu())
        return torch.cat(parts[0]), torch.cat(parts[1])

    # --- a step ---

    def begin(self, rows: Sequence[BatchRow]) -> bool:
        """A step of these rows begins; whether a layer may want what is not where it attends, so that it must
        ask (`prepare`, `pieces`)."""
        self._rows = list(rows)
        pages = [row.pages[: -(-(row.start + row.count) // self.page_size)] for row in rows]
        every = np.concatenate(pages) if pages else np.zeros(0, np.int64)
        absent = self.host.bound[every] & (self.host.of[:, every] < 0)
        self._complete = self.device is None and not absent.any()
        return not self._complete

    def store(self, layer: int, table: PageTable, write: Write) -> None:
        """Let `write` put the step's new tokens where they belong; what their windows reach back into is at
        hand.

        Raises:
            DamagedContext: see `bring`.
        """
        if self.device is not None:
            self.device.store(layer, write)
            return
        if not self._complete:
            self.bring(self.touched(0, sum(row.count for row in self._rows))[0], layer)
        write(slice(None), self.storage.kv[layer], table)

    def touched(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Pages that are read and written where tokens first ... end - 1 are stored, and those written."""
        read, written, size = [], [], self.page_size
        for row in self.cut(first, end):
            begin, behind = row.start // size, -(-(row.start + row.count) // size)
            read.append(row.pages[max(0, begin - self._back) : behind])
            written.append(row.pages[begin:behind])
        return tuple(np.unique(np.concatenate(x)).astype(np.int64) for x in (read, written))  # type: ignore[return-value]

    def pieces(self, layer: int, table: PageTable, blocks: Tensor | None) -> Iterator[Piece]:
        """The step's tokens, some at a time, with a pool and a table of what they attend to: the blocks
        `[T, Hkv, K]` chosen, or everything in dense rows. What they attend to is at hand until the next ones
        are asked for.

        Raises:
            ValueError: what a single token attends to does not fit into a tier.
        """
        pool = self.storage.kv[layer]
        if self._complete:
            yield slice(None), pool, table
            return
        chosen = None if blocks is None else blocks.cpu().numpy()
        tokens = sum(row.count for row in self._rows)
        limit = (self.device.frames if self.device is not None else self.host).limit
        spans = [(0, tokens)]
        while spans:
            first, end = spans.pop()
            wanted = self._wanted(first, end, chosen)
            if limit is not None and len(wanted) > limit and end - first > 1:
                middle = (first + end) // 2
                spans += [(middle, end), (first, middle)]
                continue
            if limit is not None and len(wanted) > limit:
                raise ValueError(
                    f"a token of layer {layer} attends to {len(wanted):,} pages, and {limit:,} fit into the "
                    f"budget for keys and values: allow {len(wanted) * self.page_bytes:,} bytes or more"
                )
            yield self._piece(layer, wanted, table, (first, end), tokens)
        if tokens <= _ONCE:
            self._last[layer] = wanted
            self._look_ahead(layer)

    def _piece(
        self, layer: int, wanted: np.ndarray, table: PageTable, span: tuple[int, int], tokens: int
    ) -> Piece:
        rows, pool = self.cut(*span), self.storage.kv[layer]
        if self.device is not None:
            self.device.bring(layer, wanted)
            pool, frames = self.device.pool, self.device.frames.of[self._row[layer]]
            pages = [frames[row.pages] for row in rows]  # of pages that are not read, none
        else:
            self.bring(wanted, layer)
            pages = [row.pages for row in rows]
        if span != (0, tokens) or self.device is not None:
            table = page_table(rows, pages, self.page_size, table.pages.device)
        return slice(*span), pool, table

    def cut(self, first: int, end: int) -> list[BatchRow]:
        """The rows of tokens first ... end - 1 of the step."""
        found, begin = [], 0
        for row in self._rows:
            a, b = max(first, begin) - begin, min(end, begin + row.count) - begin
            if b > a:
                found.append(BatchRow(row.pages, row.start + a, b - a, row.sparse, row.read, row.write))
            begin += row.count
        return found

    def _wanted(self, first: int, end: int, chosen: np.ndarray | None) -> np.ndarray:
        """Pages that tokens first ... end - 1 attend to, ascending, each once."""
        place, wanted = first, []
        for row in self.cut(first, end):
            used = np.ones(-(-(row.start + row.count) // self.page_size), bool)
            if row.sparse and chosen is not None:
                listed = chosen[place : place + row.count].ravel()
                used[:] = False
                used[listed[listed >= 0]] = True
            wanted.append(row.pages[: len(used)][used])
            place += row.count
        return np.unique(np.concatenate(wanted)).astype(np.int64)

    def _look_ahead(self, layer: int) -> None:
        """Let the next sparse layer's last choice be read from disk while this one computes."""
        following = self.layers[(self._row[layer] + 1) % len(self.layers)]
        likely = self._last.get(following)
        if likely is None or not self._sources:
            return
        row = self._row[following]
        absent = likely[self.host.bound[likely] & (self.host.of[row, likely] < 0)].tolist()
        if absent:
            self.ahead.ask(following, [(page, *self._sources[page]) for page in absent])

    @property
    def is_bounded(self) -> bool:
        """Whether a budget was set."""
        return self._budget is not None or self.device is not None

    def stats(self) -> dict[str, int]:
        """What moved since the engine was made: see `traffic.stats`."""
        return stats(self)

    def describe(self) -> str:
        """The same for people, in one line."""
        return describe(self)

    def check_integrity(self) -> None:
        """Assert that each tier's frames are right."""
        self.host.check_integrity()
        if self.device is not None:
            self.device.frames.check_integrity()


def _pool_bytes(pool: KVPages) -> tuple[np.ndarray, np.ndarray]:
    """The memory of keys and of values, `[pages, bytes]`, taken in small pieces from now on."""
    for x in pool[:2]:
        in_small_pieces(x)
    keys, values = (x.view(-1).view(torch.uint8).numpy().reshape(len(x), -1) for x in pool[:2])
    return keys, values
