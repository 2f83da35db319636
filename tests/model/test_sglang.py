"""Checkpoints for SGLang: what its loader expects, what its sparse attention needs, and what is refused."""

import json

import pytest

from opensala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.engine import shipped_model
from opensala.model.sglang import check_sglang, expected_tensors

# 16 query heads for each head of keys and values, as the released model has them, and small
FITS = {
    "hidden_size": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "lightning_nh": 8,
    "lightning_nkv": 8,
    "lightning_head_dim": 8,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn"],
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.fixture
def saved(tmp_path):
    def one(**changes):
        model = MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**{**FITS, **changes}))
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return one


def refused(path, ranks=1):
    return [finding.text for finding in check_sglang(path, ranks) if finding.refused]


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_in_the_released_format_is_served(saved, tied):
    path = saved(tie_word_embeddings=tied)
    assert check_sglang(path) == [] and check_sglang(path, 2) == []


def test_the_released_configuration_is_served_with_two_gpus_a_layer():
    config = MiniCPMSALAConfig()
    shapes = expected_tensors(config)
    assert len(shapes) == 3 + 8 * 10 + 24 * 13  # 8 sparse layers of 10 tensors, 24 Lightning layers of 13
    assert shapes["model.layers.0.self_attn.o_gate.weight"] == (4096, 4096)
    assert shapes["model.layers.1.self_attn.o_norm.weight"] == (4096,)


def test_tensor_parallelism_ends_where_groups_of_heads_do(saved):
    (text,) = refused(saved(), 4)
    assert "8 query heads" in text and "need 16: use at most 2" in text
    many = refused(saved(), 64)
    assert any("num_attention_heads 32 cannot be split over 64" in text for text in many)


def test_the_shipped_model_has_too_few_heads_for_its_sparse_kernels():
    (text,) = refused(shipped_model())
    assert "2 query heads" in text and "FORCE_DENSE" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lightning_nkv": 4}, "need them equal"),
        ({"hidden_act": "gelu"}, "'silu' only"),
        ({"attn_qk_norm": True}, "attn_qk_norm puts norms"),
        ({"attn_scale_base": 500.0}, "attn_scale_base"),
        ({"max_position_embeddings": 4096}, "a context of 8192 tokens"),
        ({"attention_bias": True}, "leaves out without a word: model.layers.0.self_attn.o_gate.bias"),
    ],
)
def test_what_it_does_not_have_is_named(saved, changes, says):
    assert any(says in text for text in refused(saved(**changes))), refused(saved(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_mode": "sparse"}, "DENSE_AS_SPARSE"),
        ({"attention_mode": "dense"}, "FORCE_DENSE"),
    ],
)
def test_differences_are_told(saved, changes, says):
    (finding,) = check_sglang(saved(**changes))
    assert not finding.refused and says in finding.text


def test_tensors_are_compared_one_by_one(saved):
    from safetensors.torch import load_file, save_file

    file = saved() / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.odd.weight"] = tensors.pop("model.layers.1.self_attn.o_norm.weight")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    save_file(tensors, file, {"format": "pt"})
    missing, surplus, wrong = refused(file.parent)
    assert "unset: model.layers.1.self_attn.o_norm.weight" in missing
    assert "does not know: model.layers.1.self_attn.odd.weight" in surplus and "[5] for [64]" in wrong


def test_its_class_is_found_by_name(saved):
    path = saved()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    (text,) = refused(path)
    assert "architectures" in text and "MiniCPMSALAForCausalLM" in text


def test_folders_and_numbers_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        check_sglang(tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        check_sglang(shipped_model(), 0)
