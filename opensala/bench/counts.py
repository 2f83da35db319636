"""Operations and bytes that the work cannot avoid, counted from shapes alone.

A multiplication and an addition are two operations. Element-wise steps are not counted.
"""

from ..model import MiniCPMSALAConfig
from ..ops import BlockSpec
from ..ops.sparse import num_windows


def lightning_flops(tokens: int, heads: int, dim: int, value_dim: int) -> float:
    """Of the recurrence: k v^T into the state, q times the state."""
    return 4.0 * tokens * heads * dim * value_dim


def lightning_bytes(tokens: int, heads: int, dim: int, itemsize: int) -> float:
    """q, k, v read once, the output written once."""
    return 4.0 * tokens * heads * dim * itemsize


def selection_flops(tokens: int, heads: int, dim: int, spec: BlockSpec) -> float:
    """Scores of both levels of compressed keys (the coarse one gives the softmax denominator), exact
    search."""
    pairs = sum(
        _pairs(tokens, size, stride)
        for size, stride in ((spec.kernel_size, spec.kernel_stride), (spec.coarse_size, spec.coarse_stride))
    )
    return 2.0 * heads * dim * pairs


def _pairs(tokens: int, size: int, stride: int) -> float:
    """Pairs of a query and a full window that ends at or before it."""
    windows = num_windows(tokens, size, stride)
    return windows * (tokens - size + 1) - stride * windows * (windows - 1) / 2


def sparse_flops(tokens: int, heads: int, dim: int, spec: BlockSpec) -> float:
    """Scores and weighted values of the keys in the chosen blocks."""
    whole = spec.num_blocks * spec.block_size
    early = min(tokens, whole)
    keys = early * (early + 1) / 2 + (tokens - early) * (whole - (spec.block_size - 1) / 2)
    return 4.0 * heads * dim * keys


def dense_flops(tokens: int, heads: int, dim: int) -> float:
    """Causal softmax attention over all keys."""
    return 2.0 * heads * dim * tokens * (tokens + 1)


def prefill_flops(config: MiniCPMSALAConfig, tokens: int) -> float:
    """Of reading a prompt: products with weights (one logit row), Lightning, selection and sparse
    attention."""
    assert (
        config.head_dim
        and config.num_key_value_heads
        and config.lightning_nh
        and config.lightning_nkv
        and config.lightning_head_dim
    )
    hidden, spec = config.hidden_size, config.block_spec
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    linear = config.num_hidden_layers - sparse
    inner = config.num_attention_heads * config.head_dim
    outer = config.lightning_nh * config.lightning_head_dim
    sparse_weights = hidden * (
        (2 + config.attn_use_output_gate) * inner + 2 * config.num_key_value_heads * config.head_dim
    )
    linear_weights = hidden * (
        (2 + config.use_output_gate) * outer + 2 * config.lightning_nkv * config.lightning_head_dim
    )
    weights = (
        sparse * sparse_weights
        + linear * linear_weights
        + 3 * config.num_hidden_layers * hidden * config.intermediate_size
    )
    total = 2.0 * tokens * weights + 2.0 * config.vocab_size * hidden
    total += linear * lightning_flops(
        tokens, config.lightning_nh, config.lightning_head_dim, config.lightning_head_dim
    )
    total += sparse * selection_flops(tokens, config.num_attention_heads, config.head_dim, spec)
    return total + sparse * sparse_flops(tokens, config.num_attention_heads, config.head_dim, spec)
