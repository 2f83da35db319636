"""Hidden-state alignment: every Lightning mixer learns to give what its layer's softmax attention gives.

One pass of the teacher serves all layers. Each mixer reads the teacher's normalised hidden state and is
fitted to the teacher's attention output; the teacher's own stream carries on, so no gradient crosses layers
and only one layer's graph exists at a time. The error is squared error relative to the mean square of the
target in its sequence (the published one is not relative: layers with large outputs then meet the clip, the
others do not learn); by sequence, so that it does not matter in how many passes or on how many processes a
step is worked off. Gradients are clipped for each layer on its own, which keeps layers independent.
Source: arXiv 2601.22156, stage 1.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..parallel import whole_tensor, with_whole_weights
from .calibrate import dense_layout, read_whole, watched_attentions
from .compute import autocast
from .config import Phase
from .ranks import Ranks
from .tokens import Sample


def new_optimizer(parameters: Any, lr: float) -> torch.optim.AdamW:
    """AdamW as published: betas 0.9 and 0.95, no weight decay. The rate is that of every parameter, whatever
    family the teacher is of: muP's factors belong to models that were trained with them."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Clip a gradient, sharded or not, to a norm. Returns the norm it had, on its device: nothing waits for
    it."""
    return whole_tensor(nn.utils.clip_grad_norm_(list(parameters), most))


class Alignment:
    """The mixers of all layers with their optimizer. `mixers[i]` belongs to layer i of the teacher.

    Args:
        compute: precision of products, `float32` or `bfloat16`.
        most: the norm to which each layer's gradient is clipped.
        ranks: the processes, over which teacher and mixers are sharded if there are several.
    """

    def __init__(
        self,
        teacher: MiniCPMSALAForCausalLM,
        mixers: nn.ModuleList,
        phase: Phase,
        compute: str = "float32",
        most: float = 1.0,
        ranks: Ranks | None = None,
    ) -> None:
        self.teacher, self.mixers, self.phase = teacher, mixers, phase
        self.compute, self.most, self.ranks = compute, most, ranks or Ranks()
        self.optimizer = new_optimizer(mixers.parameters(), phase.lr)

    def step(self, _step: int, sample: Sample, rows: int) -> dict[str, Tensor]:
        """`gradients` of a whole batch, `rows` sequences a pass; losses are those of all ranks."""
        count = len(sample.ids)
        found: dict[str, Tensor] = {}
        for part in self.ranks.passes(count, rows):
            ids = sample.ids[:1] if part is None else sample.ids[part]
            share = 0.0 if part is None else len(ids) / count
            for name, value in self.gradients(ids, share).items():
                found[name] = found[name] + value if name in found else value
        return {name: self.ranks.total(value) for name, value in found.items()}

    def gradients(self, ids: Tensor, share: float = 1.0) -> dict[str, Tensor]:
        """Run ids `[B, T]`, a `share` of a step's batch, and add each mixer's gradient to what is there.

        Returns, for each layer, `loss`, the mean squared error, and `relative`, the same over the mean square
        of its target, sequence by sequence, which is what is minimised; both times `share`, `[layers]`.
        """
        layout = dense_layout(self.teacher, ids)
        squared: list[Tensor] = []
        relative: list[Tensor] = []

        def fit(n: int, x: Tensor, output: Tensor) -> None:
            target = output.float()
            size = target.square().mean((1, 2)).clamp(min=1e-30)
            with torch.enable_grad():
                error = nn.functional.mse_loss(self.mixers[n](x, layout).float(), target, reduction="none")
                error = error.mean((1, 2))
                loss = (error / size).mean()
                (loss * (share * self.ranks.world)).backward()  # sharded gradients are means over ranks
            squared.append(error.detach().mean())
            relative.append(loss.detach())

        with (
            watched_attentions(self.teacher, fit),
            torch.no_grad(),
            autocast(self.compute, ids.device),
        ):
            with_whole_weights(self.teacher, read_whole, ids)
        return {"loss": torch.stack(squared) * share, "relative": torch.stack(relative) * share}

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
