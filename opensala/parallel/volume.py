"""How many bytes context parallelism moves: counted from shapes, for planning and for the documentation.

Counted is what one rank receives; what the collectives need on top (rings, headers) is theirs.
"""

from dataclasses import dataclass

from ..model import MiniCPMSALAConfig


@dataclass(frozen=True)
class ContextVolume:
    """Bytes that one rank receives for one row.

    Attributes:
        sparse_forward, sparse_backward: of one sparse layer: keys and values, and their gradients in float32.
        lightning: of one Lightning layer, in each direction: a float32 state of every rank, whatever the
            length.
        step: all layers, forward and backward; with checkpointing the forward part comes twice.
    """

    sparse_forward: int
    sparse_backward: int
    lightning: int
    step: int


def context_volume(
    config: MiniCPMSALAConfig, ranks: int, length: int, *, element_bytes: int = 2, checkpointing: bool = False
) -> ContextVolume:
    """Traffic of context parallelism for a row of `length` tokens over `ranks` ranks, activations of
    `element_bytes`."""
    assert (
        config.num_key_value_heads and config.head_dim and config.lightning_nh and config.lightning_head_dim
    )
    others = length - length // ranks
    numbers = 2 * config.num_key_value_heads * config.head_dim * others
    forward, backward = numbers * element_bytes, numbers * max(4, element_bytes)
    state = (ranks - 1) * config.lightning_nh * config.lightning_head_dim**2 * max(4, element_bytes)
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    linear, passes = config.num_hidden_layers - sparse, 2 if checkpointing else 1
    return ContextVolume(
        forward, backward, state, sparse * (passes * forward + backward) + linear * (passes + 1) * state
    )
