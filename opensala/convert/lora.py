"""Low-rank changes of frozen matrices: W + B A, trained beside W and added to it in the end.

Source: LoRA (arXiv 2106.09685). B starts at zeros, so that a wrapped model computes what it computed.
"""

import math

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..parallel import whole_tensor

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained change of rank r: x -> x W' + x A' B'.

    Args:
        base: the layer, `[out, in]`; its weight is shared, not copied.
        rank: r.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        start = torch.randn(rank, base.in_features, generator=generator) / math.sqrt(base.in_features)
        self.lora_a = nn.Parameter(start.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        out, low = self.base(x), nn.functional.linear(x, self.lora_a)
        flat = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.lora_b.to(out.dtype).T)
        return flat.view(out.shape)

    def change(self) -> Tensor:
        """B A, `[out, in]`."""
        return self.lora_b @ self.lora_a


def add_lora(model: MiniCPMSALAForCausalLM, rank: int, seed: int) -> None:
    """Wrap the feed-forward matrices of all layers, in place.

    Raises ValueError for a rank that is no low rank of them.
    """
    most = min(model.config.hidden_size, model.config.intermediate_size)
    if not 1 <= rank <= most:
        raise ValueError(f"lora_rank must be 1 to {most} (the narrower side of the matrices), got {rank}")
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        mlp = layer.get_submodule("mlp")
        for name in FEED_FORWARD:
            base = mlp.get_submodule(name)
            assert isinstance(base, nn.Linear)
            setattr(mlp, name, LoRALinear(base, rank, generator))


@torch.no_grad()
def lora_parts(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A `[r, in]` and B `[out, r]` by the name of the weight they change."""
    return {
        f"{name}.weight": (whole_tensor(module.lora_a.detach()), whole_tensor(module.lora_b.detach()))
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


@torch.no_grad()
def merged_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole weights of a model with low-rank changes, as those of one in which they are merged."""
    merged = {name: x for name, x in state.items() if ".base." not in name and ".lora_" not in name}
    for name, x in state.items():
        if name.endswith(".base.weight"):
            layer = name.removesuffix(".base.weight")
            merged[f"{layer}.weight"] = x + state[f"{layer}.lora_b"] @ state[f"{layer}.lora_a"]
    return merged


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the changes to the matrices and leave plain layers, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                child.base.weight.add_(child.change())
                setattr(module, name, child.base)
