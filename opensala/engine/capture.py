"""A decoding step captured once in a CUDA graph and replayed: one launch instead of some 350.

A captured step has a fixed shape: 1, 2, 4, 8 or 16 sequences of one token each, page tables of one width. A
step of fewer sequences is filled up with sequences of one token that write to a page and a slot which nobody
reads. What changes from step to step (tokens, positions, lengths, page tables, slots) lies in one tensor on
the device, filled by one copy; grids follow from shapes, and kernels look up the lengths themselves.

How a step is captured is not known here but to a `Recorder`: `CudaRecorder` on a GPU, `CallAgain` in tests on
a CPU, where replaying is calling again.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..model import MiniCPMSALAForCausalLM
from ..model.batch import BatchNumbers, BatchRow, ForwardBatch, NumbersLayout, host_numbers, send
from ..model.storage import CacheStorage
from ..ops.backends import planned_backend

SIZES = (1, 2, 4, 8, 16)  # sequences of a captured step
LEAST_WIDTH = 64  # pages of a table at least
MOST_GRAPHS = 32

logger = logging.getLogger("opensala")


class Recorder(Protocol):
    """Captures work on the device."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """The tensor that holds the work's result after each replay, and what replays it. Capturing may run
        the work any number of times.

        Raises:
            RuntimeError: it cannot be captured.
        """
        ...


class CudaRecorder:
    """CUDA graphs, whose memory they share: one replays at a time, and results are read before the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        with torch.cuda.device(self.device):
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):  # kernels are compiled and libraries set up, outside of the capture
                work()
            main.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a server's) may go on using the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = work()
        return out, graph.replay


class CallAgain:
    """In place of CUDA graphs: the work is called again, its result copied to where it was first."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        out = work().clone()

        def replay() -> None:
            out.copy_(work())

        return out, replay


class CapturedStep:
    """The captured step of one shape."""

    def __init__(
        self,
        model: MiniCPMSALAForCausalLM,
        storage: CacheStorage,
        layout: NumbersLayout,
        any_sparse: bool,
        recorder: Recorder,
    ) -> None:
        self.model, self.layout, self.recorder = model, layout, recorder
        self.device = model.model.embed_tokens.weight.device
        with torch.inference_mode(False):
            self._numbers = torch.zeros(layout.size, dtype=torch.int32, device=self.device)
        self.batch = ForwardBatch.over(storage, layout, self._numbers, any_sparse)
        self.batch.chosen = {}  # a few numbers per layer, which stay where they are
        self._hidden: Tensor | None = None
        self._replay: Callable[[], None] = lambda: None

    def run(self, numbers: BatchNumbers, ids: np.ndarray) -> Tensor:
        """Normalised hidden states `[T, W]`; valid until the next run of any step."""
        host = host_numbers(self.layout.size, self.device)
        self.layout.write(host.numpy(), numbers, ids)
        send(host, self.device, into=self._numbers)
        if self._hidden is None:
            self._hidden, self._replay = self.recorder.record(self._work)
        self._replay()
        return self._hidden

    def _work(self) -> Tensor:
        self.batch._angles.clear()  # made from the positions each time
        model = self.model.model
        assert self.batch.ids is not None, "a packed step has ids"
        x = model.embed_tokens(self.batch.ids)[None] * model.config.scale_emb
        return model.run_batch(x, self.batch)[0]


class CapturedSteps:
    """The captured steps of a model, by shape; the least recently used are forgotten.

    Attributes:
        reason: why nothing is captured (any more), or None.
    """

    def __init__(
        self, model: MiniCPMSALAForCausalLM, storage: CacheStorage, recorder: Recorder | None = None
    ) -> None:
        self.model, self.storage, self.recorder = model, storage, recorder
        self.device = model.model.embed_tokens.weight.device
        if self.recorder is None and self.device.type == "cuda":
            self.recorder = CudaRecorder(self.device)
        self.reason: str | None = None
        if self.recorder is None:
            self.reason = f"there are no CUDA graphs on {self.device.type}"
        elif storage.scratch is None:
            self.reason = "the storage has no page and slot for padding"
        elif set(model.model.layer_devices()) != {self.device}:
            self.reason = "the layers are spread over several devices"
        self._graphs: OrderedDict[tuple[Any, ...], CapturedStep] = OrderedDict()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(
        self, ids: np.ndarray, rows: Sequence[BatchRow], record: bool
    ) -> tuple[Tensor, ForwardBatch] | None:
        """Hidden states `[T, W]` and the batch of a step, or None if it has to be launched by kernels."""
        count = len(rows)
        if self.reason is not None or record or count > SIZES[-1] or len(ids) != count:
            return None
        weight = self.model.model.embed_tokens.weight
        merged = self.model.model.merged_layers(weight)
        if merged is None or not self._capturable(weight):
            return None
        size = next(n for n in SIZES if n >= count)
        page_size = self.storage.config.block_spec.block_size
        longest = max(row.start + 1 for row in rows)
        width = max(LEAST_WIDTH, 1 << (-(-longest // page_size) - 1).bit_length())
        any_sparse = any(row.sparse for row in rows)
        key = (size, width, any_sparse, weight.data_ptr(), *merged.addresses)
        step = self._graphs.pop(key, None)
        if step is None:
            assert self.recorder is not None, "else there is a reason"
            layout = NumbersLayout(size, size, width)
            step = CapturedStep(self.model, self.storage, layout, any_sparse, self.recorder)
        numbers = BatchNumbers.of([*rows, *[self._nobody()] * (size - count)], page_size)
        try:
            hidden = step.run(numbers, np.pad(ids, (0, size - count)))
        except RuntimeError as error:  # the step is launched instead: what was written is written again
            self.reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._graphs.clear()
            logger.warning("decoding runs without CUDA graphs: %s", self.reason)
            return None
        self._graphs[key] = step
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return hidden[:count], step.batch

    def _nobody(self) -> BatchRow:
        """A sequence of one token that nobody reads."""
        assert self.storage.scratch is not None, "else there is a reason"
        page, slot = self.storage.scratch
        return BatchRow(np.array([page], np.int32), 0, 1, False, -1, slot)

    def _capturable(self, weight: Tensor) -> bool:
        """Whether the ops read lengths on the device: those in PyTorch read them back."""
        if isinstance(self.recorder, CallAgain):
            return True
        return planned_backend(weight) == "triton" and self.model.config.block_search == "exact"
