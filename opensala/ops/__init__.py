"""The attention operators: tensors in, tensors out. They know no config, cache or layer."""

from .lightning import alibi_slopes, lightning_attention
from .sparse import BlockSpec, compress_keys, select_blocks, sparse_attention

__all__ = ["BlockSpec", "alibi_slopes", "compress_keys", "lightning_attention", "select_blocks", "sparse_attention"]
