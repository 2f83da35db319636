"""Machines that a training or a conversion is planned for, and what layers keep in their memory."""

from dataclasses import dataclass

from .config import MiniCPMSALAConfig, check_choice

GB = 10**9


@dataclass(frozen=True)
class Device:
    """`flops`: dense bfloat16 matrix FLOP/s as the vendor states them; `memory`: bytes."""

    flops: float
    memory: int


DEVICES = {
    "a100": Device(312e12, 80 * GB),
    "h100": Device(989e12, 80 * GB),
    "h200": Device(989e12, 141 * GB),
    "b200": Device(2250e12, 180 * GB),
}


def check_machines(gpus: int, device: str, mfu: float) -> Device:
    """The device of that name.

    Raises:
        ValueError: an unknown device, a share of its FLOP/s outside 0..1, or fewer than one GPU.
    """
    check_choice("device", device, tuple(DEVICES))
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, got {mfu}")
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    return DEVICES[device]


def layer_bytes(config: MiniCPMSALAConfig, wide: int) -> int:
    """Bytes a token that the backward pass of the hungrier kind of layer needs at once. `wide`: of an
    activation's element."""
    hidden = config.hidden_size
    residual = 4 * hidden * wide + 2 * 4 * hidden  # norms compute in float32
    return residual + 4 * config.intermediate_size * wide + mixer_bytes(config, wide)


def mixer_bytes(config: MiniCPMSALAConfig, wide: int) -> int:
    """The same of a Lightning mixer alone."""
    assert config.lightning_nh and config.lightning_head_dim
    inner = config.lightning_nh * config.lightning_head_dim
    states = inner * config.lightning_head_dim * 4 // 64  # one state a chunk
    return inner * (5 * wide + 4 * 4) + states  # q, k, v in float32, output, gate
