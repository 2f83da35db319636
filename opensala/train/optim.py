"""AdamW as the model's muP parametrisation asks: matrices inside the layers learn slower the wider the model
is.

The published rates are for a width of `dim_model_base`; a matrix whose input is hidden_size wide takes the
rate divided by hidden_size / dim_model_base, while embedding, head (whose input the model divides itself) and
vectors take it as it is.
Vectors and the embedding are not decayed.
"""

from typing import Any

import torch
from torch import nn

from ..model import MiniCPMSALAConfig
from .recipe import Optimizer


def parameter_groups(
    model: nn.Module, config: MiniCPMSALAConfig, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW, each with the factor `scale` on the stage's rate. Every trainable parameter is in
    exactly one."""
    hidden: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or "embed_tokens" in name:
            plain.append(parameter)
        else:
            (hidden if ".layers." in name else head).append(parameter)
    groups = [(hidden, 1 / config.logit_divisor, weight_decay), (head, 1.0, weight_decay), (plain, 1.0, 0.0)]
    return [
        {"params": params, "scale": scale, "weight_decay": decay} for params, scale, decay in groups if params
    ]


def new_adamw(model: nn.Module, config: MiniCPMSALAConfig, settings: Optimizer) -> torch.optim.AdamW:
    """The optimizer of a stage; its rate is set before each step by `set_rate`."""
    groups = parameter_groups(model, config, settings.weight_decay)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the stage's rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
