"""The attention operators: tensors in, tensors out. They know no config, cache or layer."""

from .backends import use_backend
from .fused import norm_gate, norm_rope
from .lightning import alibi_slopes, lightning_attention
from .sparse import (
    BlockSpec,
    KVPages,
    PageTable,
    compress_keys,
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
    "PageTable",
    "alibi_slopes",
    "compress_keys",
    "extend_compressed",
    "lightning_attention",
    "norm_gate",
    "norm_rope",
    "paged_attention",
    "select_blocks",
    "select_blocks_paged",
    "sparse_attention",
    "store_kv",
    "use_backend",
]
