"""From a step of the scheduler to hidden states and logits: the one place where the engine meets the
model."""

from array import array
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from ..model import MiniCPMSALAForCausalLM
from ..model.batch import BatchRow, ForwardBatch, on_device
from ..model.cache import Advance
from ..model.storage import CacheStorage
from .capture import CapturedSteps, Recorder
from .graphs import DecodeGraphs
from .scheduler import Step, Work

_LOGITS_BYTES = 64 << 20  # of float32 logits at a time


class Runner:
    """Runs a model over pages and slots.

    Args:
        model: in evaluation mode. On a GPU its projections are merged.
        storage: the memory of its sequences.
        recorder: captures decoding steps; CUDA graphs on a GPU if None.
    """

    def __init__(
        self, model: MiniCPMSALAForCausalLM, storage: CacheStorage, recorder: Recorder | None = None
    ) -> None:
        self.model, self.storage = model, storage
        self.device = model.model.embed_tokens.weight.device
        one_device = set(model.model.layer_devices()) == {self.device}
        if (self.device.type == "cuda" and one_device) or recorder is not None:
            model.model.merge_projections()
        self.captured = CapturedSteps(model, storage, recorder)
        self.graphs = DecodeGraphs(model, storage)
        self._batch: ForwardBatch | None = None

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Compute a step: normalised hidden states `[T, W]` of its tokens, work behind work."""
        self.storage.copy_pages(step.copies)
        ids, rows = array("i"), []
        for work in step.works:
            sequence = work.sequence
            known = sequence.tokens[sequence.num_cached : sequence.num_cached + work.count]
            ids += known + array("i", sequence.draft[: work.drafted])
            pages = np.array(sequence.pages, np.int32)  # a view would keep the array from being cut
            rows.append(
                BatchRow(pages, sequence.num_cached, work.count, work.sparse, sequence.slot, work.slot)
            )
        backed = self.storage.backing is not None and self.storage.backing.begin(rows)
        record = any(work.drafted for work in step.works)
        numbers = np.frombuffer(ids, np.int32)
        model = self.model.model
        model.say_attention((work.sparse for work in step.works), model.embed_tokens.weight)
        captured = None if backed else self.captured.run(numbers, rows, record)
        if captured is not None:
            hidden, self._batch = captured
            return hidden
        if self.graphs.reason is None and not backed:
            x = self._embed(on_device(numbers, self.device))
            replayed = self.graphs.run(x, rows, record)
            if replayed is not None:
                hidden, self._batch = replayed
                return hidden
        self._batch = ForwardBatch.of(self.storage, rows, self.device, ids=numbers, record=record)
        assert self._batch.ids is not None, "sent along"
        if any(work.completes and work.sequence.params.selection for work in step.works):
            self._batch.chosen = {}
        return model.run_batch(self._embed(self._batch.ids), self._batch)[0]

    def _embed(self, ids: Tensor) -> Tensor:
        """Scaled embeddings `[1, T, W]` of tokens `[T]`."""
        return self.model.model.embed_tokens(ids)[None] * self.model.config.scale_emb

    def selected(self, rows: SequenceOf[int]) -> dict[int, np.ndarray]:
        """Blocks `[N, Hkv, K]` that each sparse layer selected for rows of the last step, in which a request
        with `selection` got a token; waits for the device. There is no layer if all sequences are dense."""
        batch = self._batch
        assert batch is not None and batch.chosen is not None, "a step of such a request keeps them"
        return {
            layer: blocks[on_device(np.array(rows, np.int32), blocks.device)].cpu().numpy()
            for layer, blocks in sorted(batch.chosen.items())
        }

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` from normalised hidden states `[N, W]`."""
        return self.model.lm_head(hidden / self.model.config.logit_divisor)

    @property
    def rows_at_a_time(self) -> int:
        """Rows of logits that may exist at a time."""
        return max(16, _LOGITS_BYTES // (4 * self.model.config.vocab_size))

    @torch.inference_mode()
    def rewind(self, step: Step, kept: SequenceOf[tuple[Work, int]]) -> None:
        """After a step with drafts: make the states of these works those behind their first so many tokens.

        The recorded keys and values are run over the states from before the step, which gives the very bits
        that
        the shorter step would have given. Pages need nothing: what lies behind a text's end is written again.
        """
        batch = self._batch
        assert batch is not None and batch.recorded is not None, "a step with drafts is recorded"
        first, places, counts = 0, [], []
        wanted = {id(work): count for work, count in kept}
        for work in step.works:
            if id(work) in wanted:
                counts.append(wanted[id(work)])
                places.append(np.arange(first, first + counts[-1]))
            first += work.count
        where = on_device(np.concatenate(places), self.device)
        read = [work.sequence.slot for work in step.works if id(work) in wanted]
        write = [work.slot for work in step.works if id(work) in wanted]
        advance = Advance.of(self.model.config, self.device, read, write, counts)
        for layer, (k, v) in batch.recorded.items():
            advance.run(k[where], v[where], self.storage.states[layer])
