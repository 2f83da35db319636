"""A small Llama as a GGUF file."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary():
    """All bytes, two merges that a digit could wrongly join, and three special tokens in front."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", "ĊĊ", "Ġa"], ["a b", "Ċ Ċ", "Ġ a"]


def interleaved(weight, heads):
    """A projection in llama.cpp's order, as its converter writes it."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, quantisation="F32", **changes):
    """The file llama.cpp's converter would write of a Llama; `changes` overrides fields, None leaves out."""
    import gguf

    config, (tokens, merges) = model.config, vocabulary()
    fields = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | changes
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    for key, value in fields.items():
        if value is not None:
            writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if f".{projection}." in name:
                array = interleaved(array, count)
        if array.ndim == 2 and quantisation != "F32":
            writer.add_tensor(_renamed(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_renamed(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(name):
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(module)]}.{kind}"


@pytest.fixture(scope="session")
def llama():
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary()[0]), **CONFIG)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A models' folder of the test's own."""
    monkeypatch.setenv("OPENSALA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
