"""Running Lightning states over keys and values that a step recorded: what a rollback does."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ops import alibi_slopes, lightning_attention_slots
from .batch import on_device
from .config import MiniCPMSALAConfig


@dataclass(frozen=True)
class Advance:
    """What running states over recorded keys and values takes, on the device, for all layers."""

    decay: Tensor
    bounds: Tensor
    read: Tensor
    write: Tensor

    @classmethod
    def of(
        cls,
        config: MiniCPMSALAConfig,
        device: torch.device,
        read: list[int],
        write: list[int],
        counts: list[int],
    ) -> "Advance":
        """`counts[n]` tokens per sequence, from slot read[n] to write[n]."""
        assert config.lightning_nh is not None, "filled by the configuration"
        n = len(counts)
        numbers = on_device(np.array([*read, *write, 0, *counts], np.int32), device)
        decay = torch.tensor(alibi_slopes(config.lightning_nh), dtype=torch.float32).to(device)
        bounds = numbers[2 * n :].cumsum(0, dtype=torch.int32)
        return cls(decay, bounds, numbers[:n], numbers[n : 2 * n])

    def run(self, k: Tensor, v: Tensor, states: Tensor) -> None:
        """Advance one layer's states by keys and values `[T, H, D]`."""
        lightning_attention_slots(
            k,
            k,
            v,
            self.decay,
            states,
            cu_seqlens=self.bounds,
            read_slots=self.read,
            write_slots=self.write,
            scale=1.0,
        )
