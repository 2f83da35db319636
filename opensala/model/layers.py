"""The parts every decoder layer shares: RMSNorm, rotary positions, SwiGLU. No attention here."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..ops import linear, norm_gate, rms_norm, silu_mul
from ..ops.linear.speed import half_product
from .config import MiniCPMSALAConfig


def runs_alone(*tensors: Tensor | None) -> bool:
    """Whether plain tensors are computed on without gradients, tracing or autocast: what the inference ops
    take.

    Their results for a row do not depend on the other rows of a call (on a CPU, bit for bit).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return all(x is None or type(x) in (Tensor, nn.Parameter) for x in tensors)


def fuses(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the fused inference steps run on these tensors: float32 anywhere, any but float64 on a GPU.

    In half precision on a CPU nothing is gained by them.
    """
    wanted = x.dtype == torch.float32 or (x.is_cuda and x.dtype != torch.float64)
    return wanted and runs_alone(x, *others)


def fuses_learning(x: Tensor) -> bool:
    """Whether the fused steps run on activations like x where gradients or autocast are on, on a CPU: each is
    one pass over memory forwards and one backwards."""
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")


def activation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what goes into a product: autocast's inside of it, x's outside."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def product(x: Tensor, weight: Tensor, bias: Tensor | None, half_rows: int | None = None) -> Tensor:
    """x W^T + b in x's dtype; in inference on a CPU a row of it does not depend on the other rows
    (`ops.linear`).

    Args:
        weight: in x's dtype, or stored in 16 bits beside a float32 x: then it is widened, which is exact.
        half_rows: rows from which x is rounded to a 16-bit weight's dtype instead (`engine/precision.py`
            sets it where the processor is faster so); the independence of rows does not hold then.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and runs_alone(x, weight, bias):
        if half_rows is not None and weight.itemsize == 2 and x.shape[:-1].numel() >= half_rows:
            return half_product(x, weight, bias)
        return linear(x, weight, bias)
    if weight.dtype != x.dtype and weight.itemsize == 2 and x.dtype == torch.float32:
        weight = weight.to(x.dtype)  # stored narrower than computed
    return nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear whose inference on a CPU does not depend on how many rows a call has (`ops.linear`).

    Attributes:
        half_rows: see `product`.
        wide: the dtype of its input and output where the weight is stored in fewer bits; None: the weight's.
    """

    half_rows: int | None = None
    wide: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias, self.half_rows)


class Embedding(nn.Embedding):
    """nn.Embedding that widens what it looks up to the dtype `wide`, if one is set."""

    wide: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        return found if self.wide is None else found.to(self.wide)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; statistics in float32 (float64 for float64)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fuses(x, self.weight):
            return rms_norm(x, self.weight, self.eps)
        if torch.is_autocast_enabled(x.device.type) or fuses_learning(x):
            # what follows is a product: under autocast it would be rounded there
            return norm_gate(x, self.weight, None, self.eps, out_dtype=activation_dtype(x))
        wide = x if x.dtype == torch.float64 else x.float()
        return nn.functional.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


def rotary_frequencies(
    dim: int, theta: float, scaling: dict[str, Any] | None, device: torch.device
) -> Tensor:
    """`[dim / 2]` radians a token, float64; `scaling` is a configuration's `rope_scaling`.

    `linear` divides every frequency by `factor`. `llama3` does so for wavelengths above
    original_max_position_embeddings / low_freq_factor tokens, leaves those below
    original_max_position_embeddings / high_freq_factor alone, and blends between. `longrope` (static: equal
    factors) divides each frequency by its own.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    if scaling is None:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "longrope":
        return frequencies / torch.tensor(scaling["short_factor"], device=device, dtype=torch.float64)
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
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)
        self.act, self.is_silu = ACT2FN[config.hidden_act], config.hidden_act == "silu"

    def forward(self, x: Tensor) -> Tensor:
        if self._stays_narrow(x):
            return self._narrow(x)
        return self.down_proj(self.activate(self.gate_proj(x), self.up_proj(x)))

    def _stays_narrow(self, x: Tensor) -> bool:
        """Whether all three products of these rows are computed in one 16-bit dtype (see `product`), by
        layers that nobody listens to or has put another module in place of."""
        parts = self.gate_proj, self.up_proj, self.down_proj
        if not self.is_silu or x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        if not all(type(p) is Linear and p.bias is None for p in parts):
            return False
        if any(p._forward_hooks or p._forward_pre_hooks for p in parts):
            return False
        weights, rows = [p.weight for p in parts], x.shape[:-1].numel()
        narrow = all(w.itemsize == 2 and w.dtype == weights[0].dtype for w in weights)
        enough = all(p.half_rows is not None and rows >= p.half_rows for p in parts)
        return narrow and enough and runs_alone(x, *weights)

    def _narrow(self, x: Tensor) -> Tensor:
        """The same bits as layer by layer, with x rounded once and nothing widened between the products:
        float32 copies of what lies between them took a fifth of the time of reading in bfloat16."""
        multiply = nn.functional.linear
        y = x.to(self.gate_proj.weight.dtype)
        inner = silu_mul(multiply(y, self.gate_proj.weight), multiply(y, self.up_proj.weight))
        return multiply(inner, self.down_proj.weight).to(x.dtype)

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up."""
        one_pass = (
            fuses(gate, up) or fuses_learning(gate) or (gate.is_cuda and torch.is_autocast_enabled("cuda"))
        )
        return silu_mul(gate, up) if self.is_silu and one_pass else self.act(gate) * up
