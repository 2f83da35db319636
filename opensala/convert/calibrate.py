"""A good start for the Lightning mixers: their output projections fitted to the teacher by least squares.

What a mixer hands to its output projection has another size and basis than what softmax attention hands to
the same matrix, so transferred weights are off by one to two orders (docs/conversion.md). The output is
linear in this matrix, so the best one for some thousand tokens follows from sums of products, without a
step.

Shapes: N tokens, I width before the projection, C hidden size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..model.layout import SequenceLayout, rows_layout
from ..parallel import set_whole, whole_tensor, with_whole_weights
from .compute import autocast
from .ranks import Ranks

KINDS = ("ridge", "scalar", "none")
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # strengths that are tried: the tokens that nothing was fitted to decide


class Products(NamedTuple):
    """Of some tokens: features with features `[I, I]`, with targets `[I, C]`, and the targets' squared size
    `[1]`; float64."""

    gram: Tensor
    cross: Tensor
    power: Tensor


def products(features: Tensor, targets: Tensor) -> Products:
    """Of features `[N, I]` and targets `[N, C]`, in float64 whatever comes in."""
    f, y = features.double(), targets.double()
    return Products(f.T @ f, f.T @ y, y.square().sum()[None])


class NormalEquations:
    """Sums of products of features `[N, I]` and targets `[N, C]`, in float64 whatever comes in."""

    def __init__(self) -> None:
        self.tokens = 0
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None
        self.power: Tensor | None = None

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add the products of some tokens."""
        self.merge(products(features, targets), features.shape[0])

    def merge(self, sums: "Products", tokens: int) -> None:
        """Add products that were made elsewhere."""
        if self.gram is None or self.cross is None or self.power is None:
            self.gram, self.cross, self.power = sums
        else:
            self.gram += sums.gram
            self.cross += sums.cross
            self.power += sums.power
        self.tokens += tokens

    def ridge(self, strength: float, toward: Tensor) -> Tensor:
        """`[C, I]`, the weight with the least squared error plus strength * mean squared feature * tokens *
        |weight - toward|^2."""
        assert self.gram is not None and self.cross is not None, "something was added"
        width, start = self.gram.shape[0], toward.double()
        shift = strength * self.gram.diagonal().mean().clamp(min=1e-30)
        system = self.gram + shift * torch.eye(width, dtype=torch.float64, device=self.gram.device)
        missing = self.cross - self.gram @ start.T
        return start + torch.cholesky_solve(missing, torch.linalg.cholesky(system)).T

    def scalar(self, weight: Tensor) -> float:
        """The factor on a weight `[C, I]` with the least squared error."""
        assert self.gram is not None and self.cross is not None, "something was added"
        w = weight.double()
        size = (w @ self.gram * w).sum()
        return float((w.T * self.cross).sum() / size) if size > 0 else 1.0

    def error(self, weight: Tensor) -> float:
        """Squared error of a weight over the squared size of the targets."""
        assert self.gram is not None and self.cross is not None and self.power is not None
        w = weight.double()
        squared = (w @ self.gram * w).sum() - 2 * (w.T * self.cross).sum() + self.power
        return float(squared / self.power.clamp(min=1e-30))


@contextmanager
def watched_attentions(
    teacher: MiniCPMSALAForCausalLM, watch: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within the block, `watch(layer, x, output)` sees what each attention of the teacher reads and gives."""

    def hook_of(n: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            # a teacher in bfloat16 beside mixers in float32: outside autocast they meet in the latter
            watch(n, x if torch.is_autocast_enabled(x.device.type) else x.float(), output.detach())

        return hook

    attentions = [layer.get_submodule("self_attn") for layer in teacher.model.layers]
    hooks = [attention.register_forward_hook(hook_of(n)) for n, attention in enumerate(attentions)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def dense_layout(teacher: MiniCPMSALAForCausalLM, ids: Tensor) -> SequenceLayout:
    """The layout of whole sequences `[B, T]` for mixers that read what the teacher reads."""
    sparse = [teacher.config.attends_sparsely(ids.shape[1])] * ids.shape[0]
    return rows_layout((ids.shape[0], ids.shape[1]), None, sparse, ids.device)


class Calibration(NamedTuple):
    """Of each layer, the squared error over the squared size of the teacher's output, before and after; on
    tokens that nothing was fitted to."""

    before: list[float]
    after: list[float]


def read_whole(teacher: MiniCPMSALAForCausalLM, ids: Tensor) -> Tensor:
    """The teacher's normalised hidden states of ids `[B, T]`; with `with_whole_weights` of a sharded one."""
    return teacher.model.read_whole(ids)


@torch.no_grad()
def calibrate(
    teacher: MiniCPMSALAForCausalLM,
    mixers: nn.ModuleList,
    batches: Iterable[Tensor],
    kind: str,
    compute: str = "float32",
    ranks: Ranks | None = None,
) -> Calibration:
    """Fit every mixer's output projection to its layer's attention on batches of ids `[B, T]`, in place.

    One batch of four is left out and judges, between strengths of the ridge too: few tokens carry much of the
    targets' power, so that a plain solution fits its sample. A layer that becomes no better keeps its own.
    Each rank reads its part of a batch; the sums of a layer, and its solution, are one rank's.

    Args:
        batches: at least two. kind: `ridge` (a new matrix, held to the scaled old one by a ridge), `scalar`
        (a factor on the one there is) or `none` (only measured). compute: precision of products; the sums
        and the solution are float64.
    """
    ranks = ranks or Ranks()
    fitted = [NormalEquations() for _ in mixers]
    judges = [NormalEquations() for _ in mixers]
    for number, ids in enumerate(batches):
        with autocast(compute, ids.device):
            _collect(teacher, mixers, ids, judges if number % 4 == 1 else fitted, ranks)
    before, after = [], []
    for n, mixer in enumerate(mixers):
        parameter = mixer.get_submodule("o_proj").weight
        assert isinstance(parameter, nn.Parameter)
        weight, owner = whole_tensor(parameter.detach()).double(), n % ranks.world
        errors = torch.zeros(2, dtype=torch.float64, device=weight.device)
        if ranks.rank == owner:
            found = _solve(weight, fitted[n], judges[n], kind)
            weight, errors = found.weight, errors.new_tensor([found.before, found.after])
        ranks.from_owner(owner, weight)
        ranks.from_owner(owner, errors)
        set_whole(parameter, weight)
        before.append(float(errors[0]))
        after.append(float(errors[1]))
    return Calibration(before, after)


class _Solution(NamedTuple):
    weight: Tensor
    before: float
    after: float


def _solve(weight: Tensor, sums: NormalEquations, judge: NormalEquations, kind: str) -> _Solution:
    """The best of what `kind` allows for a weight `[C, I]`, as the judge has it."""
    candidates = [weight]
    if kind != "none":
        candidates.append(weight * sums.scalar(weight))
    if kind == "ridge":
        candidates += [sums.ridge(strength, candidates[1]) for strength in RIDGES]
    errors = [judge.error(candidate) for candidate in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return _Solution(candidates[best].contiguous(), errors[0], errors[best])


def _collect(
    teacher: MiniCPMSALAForCausalLM,
    mixers: nn.ModuleList,
    ids: Tensor,
    into: list[NormalEquations],
    ranks: Ranks,
) -> None:
    """Add what each mixer hands to its projection, and what should come out of it, for ids `[B, T]`."""
    [part] = ranks.passes(len(ids), len(ids))
    mine = ids[:1] if part is None else ids[part]
    layout = dense_layout(teacher, mine)

    def watch(n: int, x: Tensor, target: Tensor) -> None:
        seen: list[Tensor] = []
        biases: list[Tensor | None] = []
        projection = mixers[n].get_submodule("o_proj")

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            biases.append(getattr(module, "bias", None))  # whole here, a shard behind the mixer's pass

        handle = projection.register_forward_pre_hook(note)
        try:
            mixers[n](x, layout)
        finally:
            handle.remove()
        bias = biases[0]
        wanted = target.float() if bias is None else target.float() - bias
        sums = products(seen[0].flatten(0, 1), wanted.flatten(0, 1))
        owner = n % ranks.world
        for x in sums:  # a layer's sums are a matter of its owner, so that they are shared out like weights
            ranks.total_at(owner, x.mul_(part is not None))
        if ranks.rank == owner:
            into[n].merge(sums, ids.numel())

    with watched_attentions(teacher, watch):
        with_whole_weights(teacher, read_whole, mine)
