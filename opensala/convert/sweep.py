"""What each layer's softmax attention is worth: the teacher measured with one layer after the other changed.

Of every layer four things are measured on the same documents: recall and likelihood with the layer replaced
by its aligned mixer (rules `recall` and `halo`), the divergence of an all-linear model in which the layer is
restored (rule `kl`), and what the layer loses without rotary positions (HyPE takes them from kept layers).
What lies before a changed layer is not computed again: the documents' hidden states move on through the
teacher, and through the all-linear model, layer by layer, which halves the work and changes no bit of it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import SparseMixer
from ..parallel import whole_tensor
from ..runs import progress_bar
from .files import RunFiles
from .probes import Prober, Score, Stream, replaced, stream_divergences, stream_scores, stream_states
from .resolution import Estimate, estimate, mean, ratio
from .selection import Scores, importance

PASSES = 1.5  # through all layers for each layer: three kinds, each from the changed layer on


@contextmanager
def without_rope(model: MiniCPMSALAForCausalLM, layer: int) -> Iterator[None]:
    """Within the block, a softmax layer of the model has no rotary positions."""
    mixer = model.model.layers[layer].get_submodule("self_attn")
    assert isinstance(mixer, SparseMixer), "a teacher has no other mixer"
    config = mixer.config
    try:
        mixer.config = copy.copy(config)
        mixer.config.attn_use_rope = False
        yield
    finally:
        mixer.config = config


class Sweep:
    """The measurements of all layers; those that a run has made already are taken from its folder.

    Args:
        mixers: aligned, one for each layer.
        files: of the run; `scores.json` is written after every layer.
    """

    def __init__(
        self, teacher: MiniCPMSALAForCausalLM, mixers: nn.ModuleList, prober: Prober, files: RunFiles
    ) -> None:
        self.teacher, self.prober, self.files = teacher, prober, files
        sharded = prober.ranks.world > 1 or teacher.dtype == torch.float32
        self.mixers = mixers if sharded else [copy.deepcopy(mixer).to(teacher.dtype) for mixer in mixers]

    @torch.no_grad()
    def run(self, quiet: bool) -> dict[str, Any]:
        """Measure what is missing; returns the record, as `scores.json` holds it."""
        layers, record = len(self.mixers), self.files.read("scores.json") or {}
        known = [layer for layer in record.get("layers", ()) if "rope" in layer]
        plain, linear = (self.prober.streams(self.teacher.device) for _ in range(2))
        self.head = whole_tensor(self.teacher.lm_head.weight)
        if len(known) < layers:
            self.targets = [stream_states(self.teacher, stream) for stream in plain]
            teacher = self._measured(plain)
            record |= {"teacher": teacher, "asked": self.prober.asked(), "layers": known}
        with progress_bar("sweep", layers, len(known), quiet or len(known) == layers) as bar:
            for i in range(len(known), layers):
                for stream in plain:
                    stream.advance(self.teacher, i)
                with self._all_replaced(range(i)):
                    for stream in linear:
                        stream.advance(self.teacher, i)
                record["layers"].append(self._layer(i, plain, linear))
                self.files.write("scores.json", record)
                own = record["layers"][i]
                bar.advance(f"layer {i}: recall {own['recall']:.3f}, nll {own['nll']:.3f}")
        record |= summary(record)
        self.files.write("scores.json", record)
        return record

    def _layer(self, i: int, plain: tuple[Stream, ...], linear: tuple[Stream, ...]) -> dict[str, Any]:
        """What is measured of a layer, from the documents' states before it on."""
        with replaced(self.teacher, {i: self.mixers[i]}):
            found = self._measured(plain)
        with without_rope(self.teacher, i):
            found["rope"] = self._measured(plain, benchmarks=False)
        with self._all_replaced(range(i + 1, len(self.mixers))):
            rows = [
                stream_divergences(self.teacher, stream, target, self.head)
                for stream, target in zip(linear, self.targets, strict=True)
            ]
        found["each"]["kl"] = torch.stack([part.mean() for part in zip_rows(rows)]).tolist()
        found["kl"] = torch.cat(rows).mean().item()
        return found

    @contextmanager
    def _all_replaced(self, layers: range) -> Iterator[None]:
        with replaced(self.teacher, {i: self.mixers[i] for i in layers}):
            yield

    def _measured(self, streams: tuple[Stream, ...], benchmarks: bool = True) -> dict[str, Any]:
        """The score of the teacher as it is now, from where the documents are on, and what each gave."""
        facts, text = streams
        losses, right = stream_scores(self.teacher, text)
        found = [sum(row) for row in self.prober.found(stream_scores(self.teacher, facts)[1])]
        nll = losses.mean().item()
        own = Score(sum(found) / sum(self.prober.asked()), -nll, nll, right.float().mean().item())
        if benchmarks:
            own = self.prober.benchmarks(self.teacher, own)
        return {**own.as_dict(), "each": {"found": found, "nll": losses.mean(1).tolist()}}


def zip_rows(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The n-th row of every part together, for as many as the shortest has."""
    return [torch.stack(rows) for rows in zip(*parts, strict=False)]


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What is chosen by: lists by layer, under the names of the rules, and their standard errors."""
    layers = record["layers"]
    lists: dict[str, Any] = {name: [layer[name] for layer in layers] for name in ("recall", "general", "kl")}
    lists["halo"] = importance(lists["recall"], lists["general"])
    lists["rope"] = [layer["rope"]["nll"] - record["teacher"]["nll"] for layer in layers]
    return {**lists, "errors": {name: found.errors for name, found in estimates(record).items()}}


def estimates(record: dict[str, Any]) -> dict[str, Estimate]:
    """Of every list that a document's absence would change: `recall` and `halo` on the built-in probes (where
    lm-eval's tasks decide, these errors are not theirs), `nll`, `kl`, `rope`."""
    layers, teacher, asked = record["layers"], record["teacher"]["each"], record["asked"]
    documents = min(len(asked), len(teacher["nll"]))

    def recall(n: int | None) -> list[float]:
        return [ratio(layer["each"]["found"], asked, n) for layer in layers]

    def nll(n: int | None) -> list[float]:
        return [mean(layer["each"]["nll"], n) for layer in layers]

    statistics = {
        "recall": recall,
        "nll": nll,
        "halo": lambda n: importance(recall(n), [-value for value in nll(n)]),
        "kl": lambda n: [mean(layer["each"]["kl"], n) for layer in layers],
        "rope": lambda n: [
            mean(layer["rope"]["each"]["nll"], n) - mean(teacher["nll"], n) for layer in layers
        ],
    }
    return {name: estimate(documents, statistic) for name, statistic in statistics.items()}


def scores_of(record: dict[str, Any], names: tuple[str, ...]) -> Scores:
    """The lists that a rule needs."""
    return Scores.from_dict({name: record[name] for name in names})
