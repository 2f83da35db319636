"""Hidden-state alignment: every Lightning mixer learns to give what its layer's softmax attention gives.

One pass of the teacher serves all layers. Each mixer reads the teacher's normalised hidden state and is
fitted to the teacher's attention output by mean squared error; the teacher's own stream carries on, so no
gradient crosses layers and only one layer's graph exists at a time. Gradients are clipped for each layer on
its own, which keeps layers independent.
Source: arXiv 2601.22156, stage 1.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..model.layout import rows_layout
from .config import Phase

CLIP = 1.0


def new_optimizer(parameters: Any, lr: float) -> torch.optim.AdamW:
    """AdamW as published: betas 0.9 and 0.95, no weight decay."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


class Alignment:
    """The mixers of all layers with their optimizer. `mixers[i]` belongs to layer i of the teacher."""

    def __init__(self, teacher: MiniCPMSALAForCausalLM, mixers: nn.ModuleList, phase: Phase) -> None:
        self.teacher, self.mixers, self.phase = teacher, mixers, phase
        self.optimizer = new_optimizer(mixers.parameters(), phase.lr)

    def gradients(self, ids: Tensor) -> dict[str, list[float]]:
        """Run a batch `[B, T]` and leave each mixer's gradient in place.

        Returns the mean squared error of each layer, and the same relative to the mean square of its target.
        """
        # The teacher reads without gradients, the mixers learn with them: they need whole sequences
        # of their own.
        sparse = [self.teacher.config.attends_sparsely(ids.shape[1])] * ids.shape[0]
        layout = rows_layout((ids.shape[0], ids.shape[1]), None, sparse, ids.device)
        squared: list[Tensor] = []
        power: list[Tensor] = []

        def fit(n: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                x, target = (y.detach().float().view(*ids.shape, -1) for y in (args[0], output))
                with torch.enable_grad():
                    loss = nn.functional.mse_loss(self.mixers[n](x, layout), target)
                    loss.backward()
                squared.append(loss.detach())
                power.append(target.square().mean())

            return hook

        attentions = [layer.get_submodule("self_attn") for layer in self.teacher.model.layers]
        hooks = [attention.register_forward_hook(fit(n)) for n, attention in enumerate(attentions)]
        try:
            with torch.no_grad():
                self.teacher.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        errors, powers = torch.stack(squared), torch.stack(power)
        return {"loss": errors.tolist(), "relative": (errors / powers.clamp(min=1e-30)).tolist()}

    def clip(self) -> list[float]:
        """Clip each layer's gradient. Returns the norms they had."""
        return [nn.utils.clip_grad_norm_(mixer.parameters(), CLIP).item() for mixer in self.mixers]

    def update(self, step: int) -> None:
        """Take optimizer step `step` and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.rate(step)
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
