"""From a step of the scheduler to hidden states and logits: the one place where the engine meets the
model."""

from array import array
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from ..model import MiniCPMSALAForCausalLM
from ..model.advance import Advance
from ..model.batch import BatchRow, ForwardBatch, on_device
from ..model.storage import CacheStorage
from .capture import CapturedSteps, Recorder
from .graphs import DecodeGraphs
from .native_step import MOST_TOKENS, NativeSteps
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
        self.native = NativeSteps(model, storage)
        self.graphs = DecodeGraphs(model, storage)
        self._chosen: dict[int, Tensor] | None = None  # of the last step, if they were kept
        self._recorded: dict[int, tuple[Tensor, Tensor]] | None = None  # of the last step
        self._scored: tuple[Tensor, Tensor] | None = None  # hidden states and logits of the last step

    def run(self, step: Step) -> Tensor:
        """Compute a step: normalised hidden states `[T, W]` of its tokens, work behind work."""
        self.storage.copy_pages(step.copies)
        ids, rows = array("i"), []
        for work in step.works:
            sequence, count = work.sequence, work.count
            cached = sequence.num_cached
            if count == 1:
                ids.append(sequence.tokens[cached])
            else:
                known = sequence.tokens[cached : cached + count]
                ids += known + array("i", sequence.draft[: work.drafted])
            pages = np.array(sequence.pages, np.int32)  # a view would keep the array from being cut
            rows.append(BatchRow(pages, cached, count, work.sparse, sequence.slot, work.slot))
        backed = self.storage.backing is not None and self.storage.backing.begin(rows)
        record = any(work.drafted for work in step.works)
        chosen = any(work.completes and work.sequence.params.selection for work in step.works)
        numbers = np.frombuffer(ids, np.int32)
        model = self.model.model
        model.say_attention((work.sparse for work in step.works), model.embed_tokens.weight)
        self._scored = None
        if self.captured.reason is None and not backed:
            with torch.inference_mode():
                captured = self.captured.run(numbers, rows, record)
            if captured is not None:
                return self._ran(*captured)
        if not backed and len(numbers) <= MOST_TOKENS:
            every = all(work.completes and work.count == work.drafted + 1 for work in step.works)
            done = self.native.run(numbers, rows, keep=record, logits=every, chosen=chosen)
            if done is not None:
                self._recorded, self._chosen = done.recorded, done.chosen
                self._scored = None if done.logits is None else (done.hidden, done.logits)
                return done.hidden
        return self._run_layers(numbers, rows, record=record, chosen=chosen, backed=backed)

    @torch.inference_mode()
    def _run_layers(
        self, numbers: np.ndarray, rows: SequenceOf[BatchRow], *, record: bool, chosen: bool, backed: bool
    ) -> Tensor:
        """The step in calls for each layer, recorded ones if possible."""
        model = self.model.model
        if self.graphs.reason is None and not backed:
            x = self._embed(on_device(numbers, self.device))
            replayed = self.graphs.run(x, rows, record)
            if replayed is not None:
                return self._ran(*replayed)
        batch = ForwardBatch.of(self.storage, rows, self.device, ids=numbers, record=record)
        assert batch.ids is not None, "sent along"
        if chosen:
            batch.chosen = {}
        return self._ran(model.run_batch(self._embed(batch.ids), batch)[0], batch)

    def _ran(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """Keep what may be asked about the step afterwards."""
        self._recorded, self._chosen = batch.recorded, batch.chosen
        return hidden

    def _embed(self, ids: Tensor) -> Tensor:
        """Scaled embeddings `[1, T, W]` of tokens `[T]`."""
        return self.model.model.embed_tokens(ids)[None] * self.model.config.scale_emb

    def selected(self, rows: SequenceOf[int]) -> dict[int, np.ndarray]:
        """Blocks `[N, Hkv, K]` that each sparse layer selected for rows of the last step, in which a request
        with `selection` got a token; waits for the device. There is no layer if all sequences are dense."""
        assert self._chosen is not None, "a step of such a request keeps them"
        return {
            layer: blocks[on_device(np.array(rows, np.int32), blocks.device)].cpu().numpy()
            for layer, blocks in sorted(self._chosen.items())
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` from normalised hidden states `[N, W]`."""
        if self._scored is not None and hidden is self._scored[0]:  # the step made them too
            return self._scored[1]
        with torch.inference_mode():
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
        assert self._recorded is not None, "a step with drafts is recorded"
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
        for layer, (k, v) in self._recorded.items():
            advance.run(k[where], v[where], self.storage.states[layer])
