"""What a step will take, from a pass that certainly fits: time by measurement, memory by counting what is
kept.

The first pass is one short sequence; what autograd keeps of it, by the token, says how many fit. The pass
that is timed is as large as the run's own on a GPU where it fits, and about a thousand tokens on a CPU,
whose time goes with the tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .align import Alignment
from .distill import Distillation
from .tokens import Sample

_SHORT = 256  # tokens of the first pass
_CPU_TOKENS = 1024
_SHARE = 0.8  # of the free memory that a measurement may take
_LOGITS = 3 * 4  # bytes of a logit in the loss: student's, teacher's, gradient


@dataclass(frozen=True)
class Planned:
    """A row of the plan: steps left, tokens and seconds a step, bytes that a pass and the states take."""

    name: str
    steps: int
    tokens: int
    seconds: float
    memory: int


def available_bytes(device: torch.device) -> int:
    """Memory that is free for this process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second of two calls: the first one compiles and allocates."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds


class _Kept:
    """Counts the bytes that autograd keeps inside the block, parameters left out."""

    def __init__(self, parameters: Any) -> None:
        self._known = {_local(p).untyped_storage().data_ptr() for p in parameters}
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        if isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter):
            return x  # gathered from shards, and given back behind the layer
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return x

    def __enter__(self) -> "_Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def _local(p: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return p.to_local() if isinstance(p, DTensor) else p.detach()


def _states(trained: Any, others: int) -> int:
    """Weights, gradients and moments of what is trained, float32, and the bytes of other weights; what this
    process holds of them."""
    return sum(16 * _local(p).numel() for p in trained) + others


def _bytes(module: nn.Module) -> int:
    return sum(_local(p).numel() * p.element_size() for p in module.parameters())


def _row(
    name: str,
    run: Callable[[Sample], object],
    forget: Callable[[], None],
    sample: Sample,
    passes: float,
    steps: int,
    parameters: list[nn.Parameter],
    fixed: int,
    layers: int = 1,
) -> Planned:
    """Measure `run` on one short sequence, then on as many of the sample's as fit."""
    device, (count, length) = sample.ids.device, sample.ids.shape
    short = sample.rows(0, 1)
    short = Sample(*(None if x is None else x[:, :_SHORT] for x in short))  # type: ignore[arg-type]
    with _Kept(parameters) as kept:
        run(short)
    forget()
    a_token = kept.bytes / short.ids.numel() / layers
    memory = int(fixed + a_token * count * length)
    free = available_bytes(device) * _SHARE
    most = _CPU_TOKENS if device.type == "cpu" else count * length
    rows = max(1, min(count, int(min(most, free / max(a_token, 1)) // length)))
    part = sample.rows(0, rows)
    if a_token * length > free:  # not even one: a shorter one, and in proportion
        part = short

    def work() -> None:
        run(part)
        forget()

    seconds = timed(work, device) * (count * length / part.ids.numel()) * passes
    return Planned(name, steps, int(count * length * passes), seconds, memory)


def measure_alignment(alignment: Alignment, sample: Sample, passes: float, steps: int) -> Planned:
    """A row for the alignment. `passes`: of a step, each as large as the sample."""
    parameters = list(alignment.mixers.parameters())
    fixed = _states(parameters, _bytes(alignment.teacher))
    every = [*parameters, *alignment.teacher.parameters()]
    return _row(
        "alignment",
        lambda part: alignment.gradients(part.ids),
        alignment.forget,
        sample,
        passes,
        steps,
        every,
        fixed,
        len(alignment.mixers),  # one layer's graph exists at a time
    )


def measure_distillation(
    name: str, distillation: Distillation, sample: Sample, passes: float, steps: int
) -> Planned:
    """A row for a phase of distillation. `passes`: of a step, each as large as the sample."""
    student, vocabulary = distillation.student, distillation.student.config.vocab_size
    pieces = _LOGITS * min(
        sample.ids.numel() * vocabulary, 1 << (24 if sample.ids.device.type == "cpu" else 27)
    )
    frozen = sum(_local(p).nbytes for p in student.parameters() if not p.requires_grad)
    fixed = _states(distillation.parameters, frozen + pieces + distillation.head.numel() * 4)
    return _row(
        "distillation" if name == "distill" else name,
        lambda part: distillation.gradients(0, part),
        distillation.forget,
        sample,
        passes,
        steps,
        list(student.parameters()),
        fixed,
    )
