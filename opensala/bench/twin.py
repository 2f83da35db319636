"""A full-attention twin of a MiniCPM-SALA model, for comparing speed: the same layers, heads and sizes with
ordinary softmax attention in every layer, random weights, from transformers (Qwen3 with torch's own
scaled_dot_product_attention). A converted model's original is timed in the same way."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from ..model import MiniCPMSALAConfig
from ..model.compat import CACHE_ARGUMENT


@dataclass(frozen=True)
class TwinTiming:
    """Seconds to the first token, decoding rate and cache size (bytes) of the twin."""

    time_to_first_token: float
    decode_tokens_per_second: float
    cache_bytes: int


QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=1 << 20,
    attn_implementation="sdpa",
)


def twin_config(config: MiniCPMSALAConfig) -> Qwen3Config:
    """Full attention with the layers, heads and sizes of a MiniCPM-SALA configuration."""
    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        attn_implementation="sdpa",
    )


def build_dense(
    config: Qwen3Config, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Qwen3ForCausalLM:
    """A full-attention model of random weights."""
    torch.manual_seed(seed)
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype).eval()


@torch.inference_mode()
def time_twin(
    twin: Any,
    ids: Tensor,
    new_tokens: int = 16,
    on_layer: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TwinTiming:
    """Prefill `ids` `[1, T]` in one call (the fastest way for dense attention), then decode greedily.

    Args:
        twin: a causal language model of transformers, its layers in `model.layers`.
        on_layer: called when the prefill has finished a layer.
        clock: seconds; `time.process_time` where other processes disturb.
    """
    hooks = (
        [layer.register_forward_hook(lambda *_: on_layer()) for layer in twin.model.layers]
        if on_layer
        else []
    )
    start = clock()
    output = twin(ids, use_cache=True, logits_to_keep=1)
    first = clock() - start
    for hook in hooks:
        hook.remove()
    cache = output[CACHE_ARGUMENT]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    start = clock()
    for _ in range(new_tokens):
        output = twin(output.logits[:, -1:].argmax(-1), use_cache=True, **{CACHE_ARGUMENT: cache})
    return TwinTiming(first, new_tokens / (clock() - start), size)


def time_layers(
    twin: Any,
    ids: Tensor,
    layers: int,
    new_tokens: int = 16,
    on_layer: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TwinTiming:
    """What `time_twin` would find, from `layers` of the layers: one of them is run, then so many, and each
    further one counts as much as the mean of those between.

    Layers of one shape cost the same, and at lengths where full attention takes minutes it is a fair way to
    know them in seconds. With all layers or more this is `time_twin` itself.

    Raises:
        ValueError: fewer than two layers, of a model that has more.
    """
    every = twin.model.layers
    count = len(every)
    if layers >= count:
        return time_twin(twin, ids, new_tokens, on_layer, clock)
    if layers < 2:
        raise ValueError(f"layers must be at least 2, or all {count}, got {layers}")
    found = []
    try:
        for number in (1, layers):
            twin.model.layers = every[:number]
            twin.config.num_hidden_layers = number  # a cache is made for so many
            found.append(time_twin(twin, ids, new_tokens, on_layer, clock))
    finally:
        twin.model.layers, twin.config.num_hidden_layers = every, count
    few, many = found
    share = (count - layers) / (layers - 1)  # of the difference, to be added
    first = many.time_to_first_token + share * (many.time_to_first_token - few.time_to_first_token)
    step = 1 / many.decode_tokens_per_second
    # so short a time that noise may be larger than what layers add
    step += share * max(0.0, step - 1 / few.decode_tokens_per_second)
    return TwinTiming(first, 1 / step, many.cache_bytes * count // layers)
