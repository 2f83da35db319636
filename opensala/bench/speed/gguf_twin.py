"""The dense Transformer of a preset as GGUF files with random weights, for llama.cpp to read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from ...hub.gguf import require_gguf

KINDS = ("F16", "Q8_0", "Q4_0")


def write_twin(config: PretrainedConfig, kind: str, path: Path) -> None:
    """Write a Llama-shaped model of these sizes, every matrix in `kind`.

    Raises:
        ValueError: the gguf package is missing.
    """
    gguf = require_gguf()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # ids are given
    rng = np.random.default_rng(0)
    for name, shape in shapes(config):
        array = (0.02 * rng.standard_normal(shape, dtype=np.float32)) if len(shape) == 2 else None
        _add(gguf, writer, name, np.ones(shape, np.float32) if array is None else array, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor; vectors are norms."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    yield "token_embd.weight", (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        for name, shape in (
            ("attn_norm", (hidden,)),
            ("attn_q", (heads, hidden)),
            ("attn_k", (kv, hidden)),
            ("attn_v", (kv, hidden)),
            ("attn_output", (hidden, heads)),
            ("ffn_norm", (hidden,)),
            ("ffn_gate", (inner, hidden)),
            ("ffn_up", (inner, hidden)),
            ("ffn_down", (hidden, inner)),
        ):
            yield f"blk.{i}.{name}.weight", shape
    yield "output_norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden)


def _add(gguf: Any, writer: Any, name: str, array: np.ndarray, kind: str) -> None:
    if array.ndim == 1:
        writer.add_tensor(name, array)
    elif kind == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(array, type_), raw_dtype=type_)
