"""Hidden-state alignment: every Lightning mixer learns to give what its layer's softmax attention gives.

One pass of the teacher serves all layers. Each mixer reads the teacher's normalised hidden state and is
fitted to the teacher's attention output; the teacher's own stream carries on, so no gradient crosses layers
and only one layer's graph exists at a time. The error is squared error relative to the mean square of the
target (the published one is not: layers with large outputs then meet the clip, the others do not learn), and
gradients are clipped for each layer on its own, which keeps layers independent.
Source: arXiv 2601.22156, stage 1.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from .calibrate import dense_layout, watched_attentions
from .compute import autocast
from .config import Phase
from .tokens import Sample


def new_optimizer(parameters: Any, lr: float) -> torch.optim.AdamW:
    """AdamW as published: betas 0.9 and 0.95, no weight decay. The rate is that of every parameter, whatever
    family the teacher is of: muP's factors belong to models that were trained with them."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Clip a gradient to a norm. Returns the norm it had, on its device: nothing waits for it."""
    return nn.utils.clip_grad_norm_(list(parameters), most)


class Alignment:
    """The mixers of all layers with their optimizer. `mixers[i]` belongs to layer i of the teacher.

    Args:
        compute: precision of products, `float32` or `bfloat16`.
        most: the norm to which each layer's gradient is clipped.
    """

    def __init__(
        self,
        teacher: MiniCPMSALAForCausalLM,
        mixers: nn.ModuleList,
        phase: Phase,
        compute: str = "float32",
        most: float = 1.0,
    ) -> None:
        self.teacher, self.mixers, self.phase = teacher, mixers, phase
        self.compute, self.most = compute, most
        self.optimizer = new_optimizer(mixers.parameters(), phase.lr)

    def step(self, _step: int, sample: Sample, rows: int) -> dict[str, Tensor]:
        """`gradients` of a whole batch, `rows` sequences a pass."""
        count = len(sample.ids)
        found: dict[str, Tensor] = {}
        for part in sample.ids.split(rows):
            for name, value in self.gradients(part, len(part) / count).items():
                found[name] = found[name] + value if name in found else value
        return found

    def gradients(self, ids: Tensor, share: float = 1.0) -> dict[str, Tensor]:
        """Run ids `[B, T]`, a `share` of a step's batch, and add each mixer's gradient to what is there.

        Returns, for each layer, `loss`, the mean squared error, and `relative`, the same over the mean square
        of its target, which is what is minimised; both times `share`, `[layers]`.
        """
        layout = dense_layout(self.teacher, ids)
        squared: list[Tensor] = []
        power: list[Tensor] = []

        def fit(n: int, x: Tensor, output: Tensor) -> None:
            target = output.float()
            size = target.square().mean().clamp(min=1e-30)
            with torch.enable_grad():
                loss = nn.functional.mse_loss(self.mixers[n](x, layout).float(), target)
                (loss * (share / size)).backward()
            squared.append(loss.detach())
            power.append(size)

        with (
            watched_attentions(self.teacher, fit),
            torch.no_grad(),
            autocast(self.compute, ids.device),
        ):
            self.teacher.model.read_whole(ids)
        errors = torch.stack(squared) * share
        return {"loss": errors, "relative": errors / torch.stack(power)}

    def clip(self) -> Tensor:
        """Clip each layer's gradient. Returns the norms they had, `[layers]`."""
        return torch.stack([clip(mixer.parameters(), self.most) for mixer in self.mixers])

    def update(self, rate: float) -> None:
        """Take an optimizer step and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
