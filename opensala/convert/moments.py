"""Second moments of what linear layers are given while a model reads a text."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def input_moments(model: nn.Module, names: Collection[str], tokens: Tensor) -> dict[str, Tensor]:
    """Mean of the outer products of inputs, float32 `[in, in]`, by the name of the layer's weight.

    Args:
        names: weights wanted; those that are no linear layer's are left out.
        tokens: `[n, length]` ids, read row by row.
    """
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        own = f"{name}.weight"
        if isinstance(module, nn.Linear) and own in names:
            sums[own] = torch.zeros(module.in_features, module.in_features)

            def add(module: nn.Module, given: tuple[Any, ...], own: str = own) -> None:
                x = given[0].float().flatten(0, -2)
                sums[own] += x.T @ x

            hooks.append(module.register_forward_pre_hook(add))
    try:
        for row in tokens:
            model(row[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / tokens.numel() for name, total in sums.items()}
