"""The operators of attention and training: tensors in, tensors out. They know no config, cache or layer."""

from .backends import use_backend
from .divergence import TokenWeights, divergence
from .fused import add_rms_norm, add_scaled, norm_gate, norm_rope, rms_norm, silu_mul, split_heads
from .lightning import alibi_slopes, lightning_attention, lightning_attention_slots
from .likeliest import Likeliest, likeliest
from .linear import linear
from .sparse import (
    BlockSpec,
    KVPages,
    PageTable,
    compress_keys,
    dense_attention,
    exact_ties,
    extend_compressed,
    paged_attention,
    select_blocks,
    select_blocks_paged,
    sparse_attention,
    store_kv,
)

__all__ = [
    "BlockSpec",
    "KVPages",
    "Likeliest",
    "PageTable",
    "TokenWeights",
    "add_rms_norm",
    "add_scaled",
    "alibi_slopes",
    "compress_keys",
    "dense_attention",
    "divergence",
    "exact_ties",
    "extend_compressed",
    "lightning_attention",
    "lightning_attention_slots",
    "likeliest",
    "linear",
    "norm_gate",
    "norm_rope",
    "paged_attention",
    "rms_norm",
    "select_blocks",
    "select_blocks_paged",
    "silu_mul",
    "sparse_attention",
    "split_heads",
    "store_kv",
    "use_backend",
]
