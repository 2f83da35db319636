"""The attention operators: tensors in, tensors out. They know no config, cache or layer."""

from .backends import use_backend
from .fused import norm_gate, norm_rope
from .lightning import alibi_slopes, lightning_attention
from .linear import linear
from .sparse import BlockSpec, compress_keys, extend_compressed, select_blocks, sparse_attention

__all__ = [
    "BlockSpec",
    "alibi_slopes",
    "compress_keys",
    "extend_compressed",
    "lightning_attention",
    "linear",
    "norm_gate",
    "norm_rope",
    "select_blocks",
    "sparse_attention",
    "use_backend",
]
