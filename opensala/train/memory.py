"""Memory of training, from the shapes: said before the first step, in bytes per device.

An estimate for choosing sizes: weights and states are exact, activations follow the tensors that each part
    keeps.
"""

from dataclasses import dataclass

import psutil
import torch

from ..model import MiniCPMSALAConfig
from ..model.flops import all_parameters
from ..model.machines import layer_bytes
from .loss import LOSS_ROWS
from .recipe import Recipe, Stage

_STATES = 16  # bytes per parameter: float32 master, gradient, two moments


@dataclass(frozen=True)
class Need:
    """Bytes a device: `states` (weights, gradients, moments), `activations` of one pass, and `loss` (logits,
    head gradient)."""

    states: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.states + self.activations + self.loss


def training_memory(config: MiniCPMSALAConfig, recipe: Recipe, stage: Stage, ranks: int = 1) -> Need:
    """What one device of `ranks` needs for a stage.

    With several ranks masters, gradients and moments are sharded over all of them; the compute copy of the
    largest gathered part (embedding and head, or two layers) stays whole.
    """
    wide = 2 if recipe.dtype == "bfloat16" else 4
    parameters, hidden, vocab = all_parameters(config), config.hidden_size, config.vocab_size
    layer = (parameters - 2 * vocab * hidden) // config.num_hidden_layers
    if ranks > 1:
        states = _STATES * parameters // ranks + (wide + 4) * (2 * vocab * hidden + 2 * layer)
    else:
        states = (_STATES + (2 * wide if wide < 4 else 0)) * parameters
    tokens = pass_tokens(recipe, stage) // stage.cp
    one = tokens * layer_bytes(config, wide)
    kept = tokens * hidden * wide
    if recipe.recompute:
        activations = one + kept * config.num_hidden_layers + _selection_bytes(config, stage, tokens)
    else:
        activations = one * config.num_hidden_layers
    gathered = 0
    if stage.cp > 1:
        assert config.num_key_value_heads and config.head_dim
        gathered = 4 * stage.sequence * config.num_key_value_heads * config.head_dim * (wide + 4)
    loss = 3 * 4 * min(LOSS_ROWS, tokens) * vocab + 4 * vocab * hidden + 8 * tokens * hidden
    return Need(states, activations + gathered, loss)


def pass_tokens(recipe: Recipe, stage: Stage) -> int:
    """Tokens of one forward and backward pass over all ranks that share it: whole sequences, at most a
    step's."""
    return stage.sequence * min(stage.sequences, max(1, recipe.micro_tokens * stage.cp // stage.sequence))


def _selection_bytes(config: MiniCPMSALAConfig, stage: Stage, tokens: int) -> int:
    """The lists of blocks of all sparse layers, kept for the backward pass."""
    if not stage.sparse:
        return 0
    assert config.num_key_value_heads
    layers = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    return 4 * tokens * config.num_key_value_heads * config.block_spec.num_blocks * layers


def available_bytes(device: torch.device) -> int:
    """Memory a process can still take on this device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def check_fits(
    config: MiniCPMSALAConfig, recipe: Recipe, stage: Stage, device: torch.device, ranks: int = 1
) -> Need:
    """Raise ValueError with needed and available bytes if the stage does not fit the device; returns what it
    needs."""
    need, have = training_memory(config, recipe, stage, ranks), available_bytes(device)
    if need.total > have:
        raise ValueError(
            f"{stage.name}: sequences of {stage.sequence:,} tokens need about {need.total:,} bytes on "
            f"{device} ({need.states:,} for weights and "
            f"optimizer, {need.activations + need.loss:,} for a pass of {pass_tokens(recipe, stage):,} "
            f"tokens over {stage.cp} rank(s)), "
            f"and {have:,} bytes are available: set {stage.name}.sequence or micro_tokens lower, "
            "recompute=true, or use more ranks"
        )
    return need
