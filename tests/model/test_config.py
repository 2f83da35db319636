"""The configuration: released keys, defaults, and refusal of what does not fit."""

import json
import math

import pytest

from opensala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.model.fields import RULES, SPARSE_RULES

from ..conftest import tiny_config


def test_defaults_are_the_released_model():
    config = MiniCPMSALAConfig()
    assert [i for i in range(32) if config.is_sparse(i)] == [0, 9, 16, 17, 22, 29, 30, 31]
    assert (config.head_dim, config.block_spec.num_blocks, config.dense_len, config.lse) == (
        128,
        96,
        8192,
        "coarse",
    )
    assert config.eos_token_id == [2, 73440]


def test_absent_keys_follow_the_others():
    config = tiny_config(head_dim=None, lightning_nh=None, lightning_nkv=None, lightning_head_dim=None)
    assert (config.head_dim, config.lightning_nh, config.lightning_nkv, config.lightning_head_dim) == (
        8,
        4,
        2,
        8,
    )
    assert config.lightning_scale_value == pytest.approx(8**-0.5)


def test_spellings_of_lightning_are_normalised():
    config = tiny_config(mixer_types=["lightning", "lightning_attn", "minicpm4", "lightning-attn"])
    assert config.mixer_types == ["lightning-attn", "lightning-attn", "minicpm4", "lightning-attn"]


def test_file_holds_released_keys_and_extensions_only_when_used(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"] is None and written["scale_depth"] == 1.4 and written["vocab_size"] == 97
    assert (
        not {"attn_qk_norm", "attention_mode", "layer_types"} & set(written)
        and "lse" not in written["sparse_config"]
    )
    tiny_config(attn_qk_norm=True, attention_mode="sparse").save_pretrained(tmp_path)
    again = MiniCPMSALAConfig.from_pretrained(tmp_path)
    assert again.attn_qk_norm and again.attention_mode == "sparse"
    assert again.to_dict() == MiniCPMSALAConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["minicpm4"]}, "mixer_types must have num_hidden_layers = 4 entries, got 1"),
        (
            {"mixer_types": ["minicpm4", "lightening", "lightning", "minicpm4"]},
            r"mixer_types\[1\].*'lightening'.*Did you mean 'lightning'",
        ),
        ({"mixer_types": None}, "mixer_types is missing"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3 must be a multiple of num_key_value_heads = 2"),
        (
            {"num_attention_heads": 3, "head_dim": None},
            "hidden_size = 32 must be a multiple of num_attention_heads = 3",
        ),
        ({"lightning_nkv": 3}, "lightning_nh = 4 must be a multiple of lightning_nkv = 3"),
        ({"hidden_size": "wide"}, "hidden_size must be a whole number of at least 1, got 'wide'"),
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        (
            {"attention_mode": "spars"},
            "attention_mode must be one of 'auto', 'dense', 'sparse', got 'spars'. Did you mean 'sparse'",
        ),
        ({"lightning_scale": "1/sqrt"}, "lightning_scale must be"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling must be null or of type linear or llama3"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling.factor must be a number from 0.001 to 1e.06, got None",
        ),
        ({"attn_scale_base": 1}, "attn_scale_base must be null or a number above 1"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"lightning_head_dim": 7}, "lightning_head_dim must be even"),
        ({"sparse_config": {"top_k": 3}}, "a key of sparse_config.*Did you mean 'topk'"),
        (
            {"sparse_config": {"block_size": 40}},
            "block_size = 40 must be a multiple of sparse_config.kernel_stride = 16",
        ),
        ({"sparse_config": {"window_size": 100}}, "window_size = 100 must be a multiple"),
        ({"sparse_config": {"topk": 1}}, "topk must exceed init_blocks"),
        ({"sparse_config": {"topk": 2.5}}, "sparse_config.topk must be a whole number"),
        ({"sparse_config": {"lse": "fine"}}, "sparse_config.lse must be one of"),
        (
            {"block_search": "hierarchical", "sparse_config": {"topk": 1000}},
            "block_search 'hierarchical' finds at most 1024 blocks, .*sparse_config.topk .* ask for 1032",
        ),
        (
            {"sparse_config": "fine"},
            "sparse_config must be null or an object of names and values, got 'fine'",
        ),
        ({"sparse_config": {"use_nope": "no"}}, "sparse_config.use_nope must be true or false, got 'no'"),
        ({"qk_norm": "false"}, "qk_norm must be true or false, got 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number from 1e-30 to 1, got -1"),
        ({"scale_emb": math.nan}, "scale_emb must be a number from 1e-06 to 1e.06, got nan"),
        ({"lightning_scale": math.inf}, "lightning_scale must be .*or a number from .*, got inf"),
        ({"vocab_size": 10**12}, "vocab_size must be a whole number of at most 4,194,304, got 1000000000000"),
        ({"hidden_act": "sillu"}, "hidden_act must be one of .*Did you mean 'silu'"),
        ({"mixer_types": "minicpm4"}, "mixer_types must be a list of names, got 'minicpm4'"),
        ({"dtype": "float13"}, "dtype must be one of .*'float32'.*, got 'float13'.*Did you mean 'float32'"),
        ({"torch_dtype": "float13"}, "dtype must be one of"),
        ({"eos_token_id": [2, 97]}, r"eos_token_id must be below vocab_size = 97, got \[2, 97\]"),
        ({"pad_token_id": "x"}, "pad_token_id must be a token id of 0 or more"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_scaling.high_freq_factor must be above low_freq_factor = 4, got 4",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_every_field_has_a_rule():
    own = set(MiniCPMSALAConfig.__annotations__) - {"model_type", "keys_to_ignore_at_inference"}
    assert own == (set(RULES) - {"dtype"}) | {"attention_mode", "block_search"}
    assert set(SPARSE_RULES) == set(MiniCPMSALAConfig().sparse_config)


def test_fields_changed_afterwards_are_checked_when_a_model_is_built():
    config = tiny_config()
    config.rms_norm_eps = -1
    with pytest.raises(ValueError, match="rms_norm_eps must be a number"):
        MiniCPMSALAForCausalLM(config)
