"""GGUF files: the weights and the tokenizer are those of the model that was written."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from opensala.convert.teacher import load_teacher
from opensala.hub.gguf import GgufFile, unpack

from .conftest import vocabulary, write_gguf

# relative error of a weight matrix, above what each format does to normal numbers
TOLERANCE = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q5_0": 0.1, "Q4_0": 0.15, "Q4_1": 0.15}


@pytest.mark.parametrize("quantisation", TOLERANCE)
def test_weights_come_back(llama, tmp_path, quantisation):
    unpack(write_gguf(tmp_path / "m.gguf", llama, quantisation), tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, weight in llama.state_dict().items():
        error = (found.state_dict()[name] - weight).norm() / weight.norm()
        assert error <= TOLERANCE[quantisation], name
    if quantisation == "F32":
        ids = torch.arange(3, 40)[None]
        torch.testing.assert_close(found(ids).logits, llama(ids).logits, rtol=0, atol=0)


def test_a_teacher_is_loaded_from_a_file(llama, tmp_path, home):
    path = write_gguf(tmp_path / "m.gguf", llama)
    teacher, ids = load_teacher(path), torch.arange(3, 40)[None]
    torch.testing.assert_close(teacher(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-5)
    folders = list((home / "gguf").iterdir())
    load_teacher(str(path))
    assert len(folders) == 1 and list((home / "gguf").iterdir()) == folders  # unpacked once


def test_the_tokenizer_splits_as_in_training(llama, tmp_path):
    unpack(write_gguf(tmp_path / "m.gguf", llama), tmp_path / "out")
    tokenizer, tokens = AutoTokenizer.from_pretrained(tmp_path / "out"), vocabulary()[0]
    assert [tokens[t] for t in tokenizer("a\n\n12 ab")["input_ids"]] == ["a", "ĊĊ", "1", "2", "Ġ", "ab"]
    text = "<|im_start|>user\nab 3.14 été<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2


def test_a_tokenizer_beside_the_file_is_taken(llama, tmp_path):
    (tmp_path / "first").mkdir()
    unpack(write_gguf(tmp_path / "m.gguf", llama), tmp_path / "first")
    path = write_gguf(tmp_path / "first" / "n.gguf", llama, **{"tokenizer.ggml.model": "llama"})
    unpack(path, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "tokenizer.json").read_text())["model"]["type"] == "BPE"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "mamba"}, "family must be one of llama, qwen3, got 'mamba'"),
        ({"llama.block_count": None}, "the field llama.block_count is missing"),
        ({"tokenizer.ggml.model": "llama"}, "only byte-level BPE"),
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre must be one of smollm, .*, got 'viking'"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary positions are scaled"),
    ],
)
def test_what_cannot_be_read_is_named(llama, tmp_path, changes, says):
    path = write_gguf(tmp_path / "m.gguf", llama, **changes)
    with pytest.raises(ValueError, match=says):
        unpack(path, tmp_path / "out")


def test_other_files_and_quantisations_are_refused(llama, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF but not really, and long enough to be read")
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        GgufFile(tmp_path / "no.gguf")
    with pytest.raises(ValueError, match="is quantised as TQ1_0; F32, F16"):
        GgufFile(write_gguf(tmp_path / "t.gguf", wide(llama), "TQ1_0"))


def wide(llama):
    """The same with rows of 256, as the larger blocks need."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    return LlamaForCausalLM(llama.config.__class__(**llama.config.to_dict() | sizes))


@pytest.mark.parametrize("quantisation", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read_by_the_gguf_package(llama, tmp_path, monkeypatch, quantisation):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[quantisation]
    rng = np.random.default_rng(0)

    def blocks(array, quantisation):  # the package writes no K-quants: any bytes are some weights
        rows, columns = array.shape
        block, size = gguf.GGML_QUANT_SIZES[quantisation]
        return rng.integers(0, 60, (rows, columns // block * size), dtype=np.uint8)

    monkeypatch.setattr(gguf.quants, "quantize", blocks)
    path = write_gguf(tmp_path / "k.gguf", wide(llama), quantisation)
    weights, file = dict(GgufFile(path).weights()), gguf.GGUFReader(path)
    raw = {tensor.name: tensor for tensor in file.tensors}["blk.1.ffn_up.weight"]
    expected = gguf.quants.dequantize(raw.data, kind)
    assert expected.shape == (256, 256) and np.isfinite(expected).all() and expected.std() > 0
    np.testing.assert_array_equal(weights["model.layers.1.mlp.up_proj.weight"], expected)
