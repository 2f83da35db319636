"""The parts every decoder layer shares: RMSNorm, rotary positions, SwiGLU. No attention here."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .config import MiniCPMSALAConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; statistics in float32 (float64 for float64)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return nn.functional.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


def rotary_frequencies(
    dim: int, theta: float, scaling: dict[str, Any] | None, device: torch.device
) -> Tensor:
    """`[dim / 2]` radians a token, float64; `scaling` is a configuration's `rope_scaling`.

    `linear` divides every frequency by `factor`. `llama3` does so for wavelengths above
    original_max_position_embeddings / low_freq_factor tokens, leaves those below
    original_max_position_embeddings / high_freq_factor alone, and blends between.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    if scaling is None:
        return frequencies
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return frequencies / scaling["factor"]
    turns = (
        scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    )  # in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotary_angles(
    positions: Tensor, dim: int, theta: float, scaling: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, T, dim / 2]` of the half-rotation form, float32.

    The angles are formed in float64: at position 10^6 a float32 product is already off by 0.06 rad.
    """
    angles = positions[..., None].double() * rotary_frequencies(dim, theta, scaling, positions.device)
    return angles.cos().float(), angles.sin().float()


class SwiGLU(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: MiniCPMSALAConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
