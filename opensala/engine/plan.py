"""What a context needs before anything runs: weights, pages, states and activations, and on which cards it
fits.

Weights, pages and states are counted from the shapes; activations are what one chunk of a prompt keeps at a
time, estimated from the widest tensors of a layer.
"""

from dataclasses import dataclass

import torch

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.storage import cache_sizes, row_bytes, text_bytes
from ..ops.sparse import num_windows
from .options import EngineOptions

CARDS = (24, 32, 48, 80, 96, 141)  # GB of the cards that people have
_USABLE = 0.95  # of a card: the driver and the allocator keep the rest


@dataclass(frozen=True)
class Plan:
    """Bytes that a context takes.

    Attributes:
        weights: parameters in the dtype.
        keys_values: K and V of the sparse layers, which may lie on a slower tier: blocks are chosen without
        them. compressed: compressed keys, which every choice of blocks reads.
        states: float32 states of the Lightning layers: two slots, and one kept behind the text.
        activations: of one chunk.
        attended: K and V that one generated token attends to, in all sparse layers.
    """

    tokens: int
    weights: int
    keys_values: int
    compressed: int
    states: int
    activations: int
    attended: int

    @property
    def resident(self) -> int:
        """What has to be where the model runs, whatever tier the rest is on."""
        return self.weights + self.compressed + self.states + self.activations + self.attended

    @property
    def total(self) -> int:
        return self.weights + self.compressed + self.states + self.activations + self.keys_values

    def fits(self, device_bytes: int) -> str:
        """`all` on a device of so many bytes, `resident` if keys and values must lie elsewhere, or `no`."""
        room = int(_USABLE * device_bytes)
        return "all" if self.total <= room else "resident" if self.resident <= room else "no"


def plan_context(
    config: MiniCPMSALAConfig, tokens: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> Plan:
    """The plan of a model's context of `tokens` tokens; `kv_dtype` of its keys and values, where it is not
    `dtype`.

    Raises:
        ValueError: fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"a context has at least one token, got {tokens}")
    assert config.num_key_value_heads and config.head_dim, "filled by the configuration"
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config)
    weights = sum({id(p): p.numel() for p in model.parameters()}.values()) * dtype.itemsize
    spec, slot = config.block_spec, cache_sizes(config, dtype).slot
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    heads = sparse * config.num_key_value_heads
    row = heads * row_bytes(config.head_dim, kv_dtype or dtype)
    pages = -(-tokens // spec.block_size) * spec.block_size
    compressed = text_bytes(config, tokens, dtype, kv_dtype) - slot - 2 * tokens * row
    blocks = min(spec.num_blocks * spec.block_size, pages) if config.attends_sparsely(tokens) else pages
    attended = 2 * blocks * row * min(config.num_key_value_heads, max(1, pages // max(1, blocks)))
    return Plan(
        tokens,
        weights,
        2 * pages * row,
        max(0, compressed),
        3 * slot,
        _activations(config, min(tokens, EngineOptions.max_batch_tokens), tokens, dtype),
        min(attended, 2 * pages * row),
    )


def _activations(config: MiniCPMSALAConfig, chunk: int, tokens: int, dtype: torch.dtype) -> int:
    """The residual stream twice, the wider of feed-forward and mixer, and the chosen blocks."""
    assert config.lightning_nh and config.lightning_head_dim and config.head_dim
    inner = max(config.num_attention_heads * config.head_dim, config.lightning_nh * config.lightning_head_dim)
    widest = max(3 * config.intermediate_size * dtype.itemsize, 5 * inner * 4)
    chosen = 4 * (config.num_key_value_heads or 1) * config.block_spec.num_blocks
    windows = num_windows(tokens, config.block_spec.coarse_size, config.block_spec.coarse_stride)
    scores = 4 * (config.num_key_value_heads or 1) * min(windows, 4096)
    return chunk * (2 * config.hidden_size * dtype.itemsize + widest + chosen + scores)
