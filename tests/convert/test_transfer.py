"""Teachers of transformers' own classes become hybrids that compute the same, tensor for tensor."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opensala.convert import assemble, lightning_mixers, load_teacher, student_config
from opensala.convert.teacher import teacher_config
from opensala.convert.transfer import hybrid_state

SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.9, 2.8, 4.0, 6.5, 9.0],
    "long_factor": [1.0, 1.1, 1.3, 1.9, 2.8, 4.0, 6.5, 9.0],
    "original_max_position_embeddings": 512,
}
TEACHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, bias": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "llama, tied, one kv head": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama, all kv heads, theta": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 4, "rope_theta": 500.0},
    ),
    "llama, llama3 rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, static longrope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": LONGROPE, "head_dim": 16},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3, tied, bias": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    ),
}


def randomise(model):
    """Weights, biases and norms with something in all of them, and attention that prefers something."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.12) if parameter.dim() == 2 else nn.init.normal_(
            parameter, 1.0 if "norm" in name else 0.0, 0.2
        )
    return model.eval()


def make_teacher(folder, name="qwen3", seed=0, **changes):
    cls, config_cls, extra = TEACHERS[name]
    torch.manual_seed(seed)
    model = randomise(cls(config_cls(**{**SIZES, **extra, **changes})))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", TEACHERS)
def test_unconverted_hybrid_is_its_teacher(name, tmp_path):
    """Every layer kept, rotary positions kept, gates as they start: the logits of transformers' class."""
    original = make_teacher(tmp_path, name)
    ids = torch.randint(0, 97, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(ids).logits
        teacher = load_teacher(tmp_path)
        torch.testing.assert_close(teacher(ids).logits, expected, atol=1e-5, rtol=1e-5)
        hybrid = assemble(teacher, student_config(teacher.config, range(4), hype=False))
        torch.testing.assert_close(hybrid(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert expected.std() > 0.3
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = type(hybrid).from_pretrained(tmp_path / "hybrid")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, hybrid(ids).logits)


class PlainMiniCPM(nn.Module):
    """MiniCPM as its paper describes it, written plainly: scaled embeddings, residuals and logits around a
    Llama block."""

    def __init__(self, weights, config):
        super().__init__()
        self.w, self.c = weights, config

    def forward(self, ids):
        w, c = self.w, self.c
        depth = c["scale_depth"] / math.sqrt(c["num_hidden_layers"])
        x = w["model.embed_tokens.weight"][ids] * c["scale_emb"]
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            x = x + depth * self.attend(self.norm(x, w[p + "input_layernorm.weight"]), p + "self_attn.")
            h = self.norm(x, w[p + "post_attention_layernorm.weight"])
            inner = nn.functional.silu(h @ w[p + "mlp.gate_proj.weight"].T) * (
                h @ w[p + "mlp.up_proj.weight"].T
            )
            x = x + depth * inner @ w[p + "mlp.down_proj.weight"].T
        x = self.norm(x, w["model.norm.weight"]) / (c["hidden_size"] / c["dim_model_base"])
        return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T

    def norm(self, x, weight):
        return x * (x.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"]).rsqrt() * weight

    def attend(self, x, p):
        heads, d = self.c["num_attention_heads"], self.c["hidden_size"] // self.c["num_attention_heads"]
        q, k, v = (
            torch.unflatten(x @ self.w[f"{p}{n}_proj.weight"].T, -1, (-1, d)).transpose(1, 2) for n in "qkv"
        )
        length = x.shape[1]
        angles = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, d, 2) / d)
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (self.rotate(y, turn) for y in (q, k))
        k, v = (y.repeat_interleave(heads // y.shape[1], 1) for y in (k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(
            torch.ones(length, length).triu(1).bool(), -torch.inf
        )
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ self.w[p + "o_proj.weight"].T

    @staticmethod
    def rotate(x, turn):
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("tied", [True, False])
def test_minicpm_without_remote_code(tmp_path, tied):
    """A checkpoint with MiniCPM's published keys; transformers has no class for it."""
    make_teacher(tmp_path, "llama", tie_word_embeddings=tied)
    weights = load_file(tmp_path / "model.safetensors")
    config = {
        **SIZES,
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
        "torch_dtype": "float32",
        "use_cache": True,
    }
    config |= {} if tied else {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 97, (2, 90), generator=torch.Generator().manual_seed(1))
    teacher = load_teacher(tmp_path)
    with torch.no_grad():
        expected = PlainMiniCPM(weights, config)(ids)
        hybrid = assemble(teacher, student_config(teacher.config, range(4), hype=False))
        torch.testing.assert_close(hybrid(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (hybrid.config.scale_emb, hybrid.config.scale_depth, hybrid.config.tie_word_embeddings) == (
        12,
        1.4,
        tied,
    )


@pytest.mark.parametrize("name", ["llama, bias", "qwen3", "llama, tied, one kv head"])
def test_converted_layers_copy_every_projection(name, tmp_path):
    original = make_teacher(tmp_path, name)
    teacher = load_teacher(tmp_path)
    config = student_config(teacher.config, [0, 3])
    hybrid = assemble(teacher, config)
    assert [config.is_sparse(i) for i in range(4)] == [True, False, False, True]
    assert not config.attn_use_rope and config.lightning_use_rope and config.lightning_nkv == 4
    theirs, ours = original.model.layers[1].self_attn, hybrid.model.layers[1].self_attn
    groups, d = 4 // teacher.config.num_key_value_heads, config.head_dim
    assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight) and torch.equal(
        ours.o_proj.weight, 2 * theirs.o_proj.weight
    )
    for head in range(4):
        mine, shared = slice(head * d, (head + 1) * d), slice(head // groups * d, (head // groups + 1) * d)
        for p in ("k_proj", "v_proj"):
            assert torch.equal(getattr(ours, p).weight[mine], getattr(theirs, p).weight[shared])
            if config.attention_bias:
                assert torch.equal(getattr(ours, p).bias[mine], getattr(theirs, p).bias[shared])
    norms = theirs.q_norm.weight if name == "qwen3" else torch.ones(d)
    assert torch.equal(ours.q_norm.weight, norms) and torch.equal(ours.o_norm.weight, torch.ones(4 * d))
    assert not ours.z_proj.weight.any()
    mixers = lightning_mixers(teacher)
    for i in (1, 2):
        own = hybrid.model.layers[i].self_attn.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in mixers[i].state_dict().items())
    assert hybrid.model.embed_tokens.weight.data_ptr() != teacher.model.embed_tokens.weight.data_ptr()


def test_hype_and_asked_for_options(tmp_path):
    make_teacher(tmp_path, "llama")
    teacher = load_teacher(tmp_path)
    config = student_config(
        teacher.config, [0, 3], attn_qk_norm=True, attn_scale_base=500, sparse_config={"dense_len": 64}
    )
    hybrid = assemble(teacher, config)
    assert (
        torch.equal(hybrid.model.layers[0].self_attn.k_norm.weight, torch.ones(10)) and config.dense_len == 64
    )
    hybrid.save_pretrained(tmp_path / "hybrid")
    written = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert written["attn_scale_base"] == 500 and written["attn_qk_norm"] and "attention_mode" not in written
    x = torch.randn(1, 6, 40)
    from opensala.model.layout import rows_layout

    layout = rows_layout((1, 6), None, [False], x.device, torch.arange(100, 106)[None])
    scaled = hybrid.model.layers[0].self_attn.project(x, layout)[0]
    hybrid.config.attn_scale_base = None
    plain = hybrid.model.layers[0].self_attn.project(x, layout)[0]
    torch.testing.assert_close(scaled[0, 2] / plain[0, 2], torch.full((4, 10), math.log(602) / math.log(500)))


def test_strict_both_ways(tmp_path):
    make_teacher(tmp_path, "qwen3")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.self_attn.sinks"] = torch.zeros(4)
    del weights["model.layers.2.self_attn.q_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"missing model.layers.2.self_attn.q_norm.weight; unexpected model.layers.1.self_attn.sinks",
    ):
        load_teacher(tmp_path)
    make_teacher(tmp_path, "qwen3")
    teacher = load_teacher(tmp_path)
    config = student_config(teacher.config, [0, 3])
    config.attn_qk_norm = False
    with pytest.raises(ValueError, match="do not make the hybrid"):
        assemble(teacher, config)
    teacher.model.layers[0].self_attn.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="layer 0: the hybrid has no place for extra"):
        hybrid_state(teacher, student_config(teacher.config, [0, 3]))


def test_what_cannot_be_converted_is_refused(tmp_path):
    GPT2Config(n_layer=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type must be one of 'llama', 'qwen3', 'minicpm', got 'gpt2'"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match="holds no config.json"):
        load_teacher(tmp_path.parent)
    llama = LlamaConfig(**SIZES).to_dict()
    for changes, message in (
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "got 'yarn'"),
        (
            {"rope_parameters": {**LONGROPE, "long_factor": [2.0] * 8}},
            "got different factors and 512: otherwise it changes with the length",
        ),
        (
            {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 256}},
            r"max_position_embeddings \(512\), got equal factors and 256",
        ),
        ({"rope_parameters": {**LONGROPE, "attention_factor": 1.2}}, "attention_factor must be 1, got 1.2"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"its weights are quantised \(awq\), which is not",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            teacher_config({**llama, **changes})
    with pytest.raises(ValueError, match="use_sliding_window"):
        teacher_config(Qwen3Config(**SIZES, use_sliding_window=True).to_dict())
    with pytest.raises(ValueError, match=r"kept layers must lie in 0..3, got \[4\]"):
        student_config(teacher_config(llama), [0, 4])
