"""End-to-end distillation: the student's next-token distributions are brought to the teacher's.

The loss is in `kl`. A teacher's logits can be kept on disk exactly, as its final hidden states, since logits
are formed from those in pieces anyway. What of the student is trained is chosen here.

Shapes: N tokens, V vocabulary, D hidden size.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import LightningMixer, SparseMixer
from ..model.layers import RMSNorm
from ..parallel import whole_tensor, with_whole_weights
from .align import clip, new_optimizer
from .compute import autocast
from .config import Phase
from .continuing import take_up
from .kl import TokenWeights, distillation_loss
from .lora import add_lora
from .ranks import Ranks
from .tokens import Sample

Targets = Callable[[int, Tensor, slice], Tensor]


def final_states(model: MiniCPMSALAForCausalLM, ids: Tensor) -> Tensor:
    """What the head of the model multiplies, `[B * T, D]`; with `with_whole_weights` of a sharded one."""
    return (model.model.read_whole(ids) / model.config.logit_divisor).flatten(0, 1)


def live_targets(teacher: MiniCPMSALAForCausalLM) -> Targets:
    """The teacher's final states of ids `[B, T]`, computed when asked for."""

    def targets(_step: int, ids: Tensor, _rows: slice) -> Tensor:
        with torch.no_grad():
            return with_whole_weights(teacher, final_states, ids)

    return targets


def cached_targets(folder: Path) -> Targets:
    """The teacher's final states of some rows of each step, from files that `cache_step` wrote."""

    def targets(step: int, ids: Tensor, rows: slice) -> Tensor:
        with safe_open(folder / f"{step:07}.safetensors", "pt", device=str(ids.device)) as file:
            states = file.get_slice("states")
            return states[rows.start * ids.shape[1] : rows.stop * ids.shape[1]]

    return targets


def cache_step(
    teacher: MiniCPMSALAForCausalLM, folder: Path, step: int, ids: Tensor, ranks: Ranks | None = None
) -> None:
    """Write the teacher's final states of a step's ids `[B, T]`, unless they are there."""
    file, ranks = folder / f"{step:07}.safetensors", ranks or Ranks()
    if ranks.first(file.exists):
        return
    mine = ranks.own(ids)
    states = live_targets(teacher)(step, mine, slice(0, len(mine)))
    states = ranks.gather(states.unflatten(0, (len(mine), -1)), len(ids)).flatten(0, 1)

    def write() -> None:
        partial = file.with_suffix(".partial")
        save_file({"states": states.contiguous().cpu()}, partial)
        partial.replace(file)

    ranks.first(write)


def choose_trainable(student: MiniCPMSALAForCausalLM, trainable: str, rank: int, seed: int) -> None:
    """Mark what is trained, in place: see `ConvertConfig.trainable`. With `lora` the feed-forwards are
    wrapped."""
    student.requires_grad_(trainable == "all")
    if trainable == "lora":
        add_lora(student, rank, seed)
    kinds = (LightningMixer, SparseMixer, RMSNorm) if trainable == "lora" else (LightningMixer,)
    for module in student.modules():
        if isinstance(module, kinds):
            module.requires_grad_(True)


class Distillation:
    """A student, what is trainable of it, and its optimizer.

    Args:
        trainable: `linear` (the Lightning mixers; everything else is frozen), `lora` or `all`.
        targets: the teacher's final states of rows of a step.
        head: the teacher's head, `[V, D]`, or its shard.
        compute: precision of products, `float32` or `bfloat16`.
        most: the norm to which the gradient is clipped.
        rank, seed: of `lora`.
        start: outcome that the student takes its weights from; None leaves it as it is.
        ranks: the processes, over which the student is sharded here if there are several.
    """

    def __init__(
        self,
        student: MiniCPMSALAForCausalLM,
        trainable: str,
        targets: Targets,
        head: Tensor,
        phase: Phase,
        *,
        compute: str = "float32",
        most: float = 1.0,
        rank: int = 16,
        seed: int = 0,
        start: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.student, self.targets, self.head = student, targets, head
        self.compute, self.most, self.ranks = compute, most, ranks or Ranks()
        choose_trainable(student, trainable, rank, seed)
        if start is not None:
            take_up(student, start)
        self.ranks.shard(student, compute)
        self.parameters: list[nn.Parameter] = [p for p in student.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"trainable = {trainable!r} leaves nothing to train: every layer is kept")
        self.begin(phase)

    def begin(self, phase: Phase) -> None:
        """Begin a phase, with a new optimizer."""
        self.phase = phase
        self.optimizer = new_optimizer(self.parameters, phase.lr)

    def step(self, step: int, sample: Sample, rows: int) -> dict[str, Tensor]:
        """`gradients` of a whole batch, `rows` sequences a pass; the loss is that of all ranks."""
        total, losses = self.weight(sample), []
        for part in self.ranks.passes(len(sample.ids), rows):
            if part is None:  # the others wait: a sequence that counts nothing
                losses.append(self.gradients(step, sample.rows(0, 1), slice(0, 1), total * math.inf))
            else:
                losses.append(self.gradients(step, sample.rows(part.start, part.stop), part, total))
        return {"loss": self.ranks.total(torch.stack(losses).sum())}

    def gradients(
        self, step: int, sample: Sample, rows: slice | None = None, total: Tensor | None = None
    ) -> Tensor:
        """Run sequences `[B, T]`, add their gradient to what is there, return their part of the loss in nats.

        Args:
            rows: which of the step's batch they are; the whole batch if None.
            total: the `weight` of the step's batch; that of these sequences if None. Infinite where they are
                to count nothing.
        """
        rows = rows or slice(0, len(sample.ids))
        weights = token_weights(sample, self.phase)
        share = 1.0 / (self.weight(sample) if total is None else total)
        weights = TokenWeights(
            weights.kl * share, None if weights.ce is None else weights.ce * share, weights.targets
        )
        with autocast(self.compute, sample.ids.device):
            targets = self.targets(step, sample.ids, rows) if self.sees(sample) else None
            head = None if targets is None else whole_tensor(self.head)
            loss = with_whole_weights(self.student, _loss, sample.ids, targets, head, weights)
        (loss * self.ranks.world).backward()  # sharded gradients are means over ranks
        return loss.detach()

    def weight(self, sample: Sample) -> Tensor:
        """What all tokens of sequences count together: the loss of a step is divided by that of its batch."""
        weights = token_weights(sample, self.phase)
        counted = weights.kl if self.sees(sample) or weights.ce is None else weights.ce
        return counted.sum().clamp(min=1.0)

    def sees(self, sample: Sample) -> bool:
        """Whether the teacher is asked about sequences of this length."""
        most = self.phase.teacher_length
        return most is None or sample.ids.shape[1] <= most

    def clip(self) -> Tensor:
        """Clip the gradient. Returns the norm it had."""
        return clip(self.parameters, self.most)

    def update(self, rate: float) -> None:
        """Take an optimizer step and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def _loss(
    student: MiniCPMSALAForCausalLM,
    ids: Tensor,
    targets: Tensor | None,
    head: Tensor | None,
    weights: TokenWeights,
) -> Tensor:
    """The weighted sum of losses of ids `[B, T]`; see `kl.distillation_loss`."""
    return distillation_loss(final_states(student, ids), student.lm_head.weight, targets, head, weights)


def token_weights(sample: Sample, phase: Phase) -> TokenWeights:
    """What each of the tokens `[B, T]`, flattened, counts before it is divided by the sum of `kl`.

    A token stands for the prediction of the one behind it: it is the answers' own tokens that are predicted.
    """
    ids, answers = sample
    kl = torch.ones(ids.shape, device=ids.device)
    if answers is None:
        return TokenWeights(kl.flatten())
    predicted = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    predicted[:, :-1] = answers[:, 1:]
    kl = torch.where(predicted, phase.answer_weight, kl)
    if not phase.cross_entropy:
        return TokenWeights(kl.flatten())
    targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    return TokenWeights(kl.flatten(), (predicted * phase.cross_entropy).flatten(), targets.flatten())
