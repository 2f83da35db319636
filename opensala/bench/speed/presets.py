"""Shapes that are compared: a hybrid, and the dense Transformer that it stands beside."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from ...engine.load import checkpoint_config
from ...model import MiniCPMSALAConfig
from ..twin import QWEN3_8B, twin_config

_MOST = 1 << 21  # tokens
K = 1024
LENGTHS = {  # by default; the first of a CPU's are also where llama.cpp can be measured in minutes
    "cpu": (2 * K, 4 * K, 32 * K, 64 * K, 256 * K),
    "cuda": (64 * K, 128 * K, 256 * K, 512 * K, 1024 * K),
}
_SPARSE_135M = (0, 6, 17, 18, 20, 21, 23, 29)  # as in smollm2-135m-sala


@dataclass(frozen=True)
class Preset:
    """A hybrid and a dense configuration; `quick` is for tests."""

    name: str
    hybrid: MiniCPMSALAConfig
    dense: PretrainedConfig


def _hybrid_135m() -> MiniCPMSALAConfig:
    mixers = ["minicpm4" if i in _SPARSE_135M else "lightning-attn" for i in range(30)]
    return MiniCPMSALAConfig(
        **_sizes(30, 576, 1536, 49152),
        mixer_types=mixers,
        lightning_nh=9,
        lightning_nkv=3,
        lightning_head_dim=64,
        sparse_config={"window_size": 1024, "topk": 32, "dense_len": 4096},
        max_position_embeddings=_MOST,
    )


def _sizes(layers: int, hidden: int, inner: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 192),
        "head_dim": 64,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }


def _dense(layers: int, hidden: int, inner: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        **_sizes(layers, hidden, inner, vocabulary),
        tie_word_embeddings=False,
        max_position_embeddings=_MOST,
        attn_implementation="sdpa",
    )


def preset(name: str) -> Preset:
    """The shapes of a name: `135m`, `small` (the model that ships), `9b` beside Qwen3-8B, `quick`.

    Raises:
        ValueError: another name.
    """
    if name == "135m":
        return Preset(name, _hybrid_135m(), _dense(30, 576, 1536, 49152))
    if name == "quick":
        hybrid = MiniCPMSALAConfig(
            **_sizes(2, 128, 256, 256),
            mixer_types=["minicpm4", "lightning-attn"],
            sparse_config={"window_size": 128, "topk": 4, "dense_len": 256},
            max_position_embeddings=_MOST,
        )
        return Preset(name, hybrid, _dense(2, 128, 256, 256))
    if name == "small":
        config = checkpoint_config(None)
        return Preset(name, config, _as_llama(twin_config(config)))
    if name == "9b":
        return Preset(name, MiniCPMSALAConfig(max_position_embeddings=_MOST), QWEN3_8B)
    raise ValueError(f"--preset must be 135m, small, 9b or quick, got {name!r}")


def _as_llama(config: Qwen3Config) -> LlamaConfig:
    """A dense twin without norms of queries and keys, which llama.cpp's plainest architecture is without."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    )
    return LlamaConfig(
        **{name: getattr(config, name) for name in names},
        max_position_embeddings=_MOST,
        attn_implementation="sdpa",
    )


def dense_bytes(config: PretrainedConfig, tokens: int, weights: float) -> float:
    """Memory that the dense model needs at least: weights of so many bytes each, and a cache in 16 bits."""
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    heads = config.num_attention_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * config.num_key_value_heads * config.head_dim)
    layer += 3 * config.hidden_size * config.intermediate_size
    return weights * config.num_hidden_layers * layer + tokens * kv


def threads() -> int:
    return torch.get_num_threads()
