"""A decoding step recorded once and replayed: what remains of it is the work of its kernels.

A step with few tokens costs more in Python than in arithmetic. Its native calls are the same every time, on
the same
memory, so they are recorded with buffers of their own for what changes: positions, lengths, page tables,
    slots. A
graph serves steps of one shape: so many tokens of so many sequences, page tables of one width.

Only what a recording can hold is replayed: on a CPU, with the compiled kernels, in float32, without hooks or
foreign modules in the model. Everything else runs layer by layer in Python, with the same bits.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import LightningMixer, SparseMixer
from ..model.batch import BatchNumbers, BatchRow, ForwardBatch
from ..model.layers import Linear, RMSNorm, SwiGLU, rotary_angles
from ..model.modeling import MiniCPMSALADecoderLayer
from ..model.quantised import QuantisedLinear
from ..model.storage import CacheStorage
from ..model.watch import ModuleWatch
from ..ops import PageTable
from ..ops.backends import planned_backend
from ..ops.native.program import NotReplayable, Program, record

MOST_TOKENS = 64  # of a step that is replayed: beyond, arithmetic outweighs Python
MOST_GRAPHS = 32
_OURS = (MiniCPMSALADecoderLayer, SparseMixer, LightningMixer, Linear, RMSNorm, SwiGLU)


class DecodeGraph:
    """The recorded calls of steps of one shape.

    Args:
        tokens, sequences: of the step.
        width: pages per sequence that its table has room for.
        any_sparse: whether any sequence selects blocks.
        keep: whether keys and values of the Lightning layers are kept for a rollback.
    """

    def __init__(
        self,
        model: MiniCPMSALAForCausalLM,
        storage: CacheStorage,
        tokens: int,
        sequences: int,
        width: int,
        any_sparse: bool,
        keep: bool,
    ) -> None:
        self.model, config = model, model.config
        self._numbers = BatchNumbers(
            np.zeros(tokens, np.int64),
            np.zeros(sequences + 1, np.int32),
            np.zeros(sequences, np.int32),
            np.full((sequences, width), -1, np.int32),
            *(np.zeros(sequences, np.int32) for _ in range(3)),
        )
        n = {name: torch.from_numpy(array) for name, array in self._numbers.__dict__.items()}
        table = PageTable(n["bounds"], n["lengths"], n["pages"], n["sparse"])
        self.batch = ForwardBatch(
            storage,
            n["positions"],
            table,
            n["read"],
            n["write"],
            any_sparse,
            {} if keep else None,
            chosen={},  # costs nothing: the program keeps this memory anyway
        )
        self._x = torch.zeros(1, tokens, config.hidden_size)
        self._dims = sorted(_rotated(config))
        for dim in self._dims:
            self.batch._angles[dim] = self._rotary(dim)
        self._program: Program | None = None
        self._hidden: Tensor | None = None

    def run(self, x: Tensor, rows: Sequence[BatchRow], page_size: int) -> Tensor:
        """Normalised hidden states `[T, W]` from scaled embeddings; valid until the next run."""
        now = BatchNumbers.of(rows, page_size)
        for name, target in self._numbers.__dict__.items():
            source = getattr(now, name)
            target[..., : source.shape[-1]] = source
        self._x.copy_(x)
        for dim in self._dims:
            for target, angle in zip(self.batch._angles[dim], self._rotary(dim), strict=True):
                target.copy_(angle)
        if self._program is None:
            with record() as calls:
                self._hidden = self.model.model.run_batch(self._x, self.batch)[0]
            self._program = calls.program()
        else:
            self._program.run()
        assert self._hidden is not None, "made with the program"
        return self._hidden

    def _rotary(self, dim: int) -> tuple[Tensor, Tensor]:
        config = self.model.config
        return rotary_angles(self.batch.positions[None], dim, config.rope_theta, config.rope_scaling)


class DecodeGraphs:
    """The graphs of a model, by shape; the least recently used are forgotten."""

    def __init__(self, model: MiniCPMSALAForCausalLM, storage: CacheStorage) -> None:
        self.model, self.storage = model, storage
        self.reason: str | None = None  # why nothing is replayed, once that is known
        self._graphs: OrderedDict[tuple[Any, ...], DecodeGraph] = OrderedDict()
        self._modules = [m for m in self._all_modules() if not isinstance(m, torch.nn.ModuleList)]
        self._quantised = [m for m in self._modules if isinstance(m, QuantisedLinear)]
        foreign = [type(m).__name__ for m in self._modules if type(m) not in _OURS and list(m.parameters())]
        if foreign:
            self.reason = f"the model has a module of another kind, {foreign[0]}"
        self._watch = ModuleWatch(self._all_modules())
        weights = [*model.model.layers.parameters(), *model.model.norm.parameters()]
        if model.compute_dtype != torch.float32 or any(w.device.type != "cpu" for w in weights):
            self.reason = "it is for float32 on a CPU"
        for module in self._modules:
            if isinstance(module, LightningMixer):
                module.decay(model.device)  # made once, and not while calls are recorded

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def _codes(self) -> Iterator[Tensor]:
        """Of the quantised layers, in the form that the recorded calls read."""
        for module in self._quantised:
            packed = module.pack()
            if packed is not None:
                yield packed.codes

    def _all_modules(self) -> Iterator[torch.nn.Module]:
        yield from self.model.model.layers.modules()
        yield self.model.model.norm

    def run(self, x: Tensor, rows: Sequence[BatchRow], keep: bool) -> tuple[Tensor, ForwardBatch] | None:
        """Hidden states and the batch of a step, or None if it has to run in Python."""
        if self.reason is not None or x.shape[1] > MOST_TOKENS or self._disturbed(x):
            return None
        size = self.storage.config.block_spec.block_size
        longest = max(row.start + row.count for row in rows)
        width = max(8, 1 << (-(-longest // size) - 1).bit_length())
        any_sparse = any(row.sparse for row in rows)
        where = (*self._watch.addresses(), *(codes.data_ptr() for codes in self._codes()))
        config = self.model.config
        key = (
            x.shape[1],
            len(rows),
            width,
            any_sparse,
            keep,
            where,
            config.block_search,
            torch.get_num_threads(),
        )
        graph = self._graphs.get(key)
        if graph is None:
            graph = DecodeGraph(self.model, self.storage, x.shape[1], len(rows), width, any_sparse, keep)
        try:
            hidden = graph.run(x, rows, size)
        except NotReplayable as error:  # the step runs again in Python: what was written is written again
            self.reason = str(error)
            return None
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return hidden, graph.batch

    def _disturbed(self, x: Tensor) -> bool:
        """Whether something must see each call of a layer or replaced one, or another backend is asked
        for."""
        return self._watch.disturbed() is not None or planned_backend(x) != "cpp"


def _rotated(config: Any) -> set[int]:
    """Head dimensions that rotary positions are applied to."""
    dims = {config.lightning_head_dim} if config.lightning_use_rope else set()
    return dims | ({config.head_dim} if config.attn_use_rope else set())
