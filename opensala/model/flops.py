"""Floating-point operations of the model, counted from its configuration, and how many a machine does in a
second. A multiply-add is two.

Counted: every matrix product, softmax attention (causal, so half of the rectangle), block selection,
    Lightning attention in
chunks. Not counted: norms, rotations, gates, the optimizer.
"""

import time

import torch

from .config import MiniCPMSALAConfig

_CHUNK = 64  # of Lightning attention
_SIZE = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.3


def matrix_parameters(config: MiniCPMSALAConfig) -> int:
    """Parameters that take part in a matrix product for every token: all but the embedding and the norms."""
    return (
        sum(_layer_matrices(config, i) for i in range(config.num_hidden_layers))
        + config.vocab_size * config.hidden_size
    )


def all_parameters(config: MiniCPMSALAConfig) -> int:
    """Parameters of the model but for norms (a fraction of a percent)."""
    return matrix_parameters(config) + (
        0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    )


def _layer_matrices(config: MiniCPMSALAConfig, layer: int) -> int:
    assert (
        config.head_dim
        and config.num_key_value_heads
        and config.lightning_nh
        and config.lightning_nkv
        and config.lightning_head_dim
    )
    hidden = config.hidden_size
    feed_forward = 3 * hidden * config.intermediate_size
    if config.is_sparse(layer):
        inner, kv, gate = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
            config.attn_use_output_gate,
        )
    else:
        inner, kv, gate = (
            config.lightning_nh * config.lightning_head_dim,
            config.lightning_nkv * config.lightning_head_dim,
            config.use_output_gate,
        )
    return feed_forward + hidden * (2 * inner + 2 * kv + (inner if gate else 0))


def _mean_seen(length: int, most: float) -> float:
    """Mean over positions 1..length of min(position, most)."""
    if length <= most:
        return (length + 1) / 2
    return (most * (most + 1) / 2 + (length - most) * most) / length


def forward_flops(config: MiniCPMSALAConfig, length: int, sparse: bool) -> float:
    """FLOPs per token of one forward pass over a document of `length` tokens; `sparse` as a stage's."""
    assert config.head_dim and config.lightning_nh and config.lightning_head_dim
    spec, width = config.block_spec, config.num_attention_heads * config.head_dim
    if sparse and length >= config.dense_len:
        seen = _mean_seen(length, spec.num_blocks * spec.block_size)
        levels = (length / 2) * (1 / spec.kernel_stride + 1 / spec.coarse_stride)
        attention = 4 * width * seen + 2 * width * levels
    else:
        attention = 4 * width * (length + 1) / 2
    inner = config.lightning_nh * config.lightning_head_dim
    lightning = inner * (4 * config.lightning_head_dim + 4 * _CHUNK)
    count = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    return 2 * matrix_parameters(config) + count * attention + (config.num_hidden_layers - count) * lightning


def training_flops(config: MiniCPMSALAConfig, length: int, sparse: bool) -> float:
    """FLOPs per token of forward and backward pass (three forward passes; what is recomputed is not
    counted)."""
    return 3 * forward_flops(config, length, sparse)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products on this device, as measured now: what MFU is a share of."""
    size = _SIZE.get(device.type, 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            a @ b.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once = run(1), run(1)
    times = max(1, int(_SECONDS / max(once[1], 1e-6)))
    return 2 * size**3 * times / run(times)
