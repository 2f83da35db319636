"""Checkpoints: names of the released format, round trips, and strict refusal of anything that does not
fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opensala import MiniCPMSALAForCausalLM

from ..conftest import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_are_those_of_the_released_format(folder):
    names = set(load_file(folder / "model.safetensors"))
    common = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
    }
    own = {
        0: {"self_attn.o_gate.weight"},
        1: {f"self_attn.{x}.weight" for x in ("q_norm", "k_norm", "o_norm", "z_proj")},
    }
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    wanted |= {f"model.layers.{i}.{n}" for i, kind in enumerate((0, 1, 1, 0)) for n in common | own[kind]}
    assert names == wanted
    assert load_file(folder / "model.safetensors")["model.layers.1.self_attn.o_norm.weight"].shape == (32,)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True, "attn_qk_norm": True, "attention_bias": True}],
    ids=["plain", "options"],
)
def test_round_trip_keeps_the_logits(tmp_path, changes):
    model, ids = tiny_model(**changes), torch.arange(3, 90)[None]
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not changes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MiniCPMSALAForCausalLM"]


def test_saving_with_extensions_says_so(tmp_path, caplog):
    caplog.set_level("WARNING", logger="opensala")  # the command line, run by other tests, silences it
    tiny_model().save_pretrained(tmp_path / "plain")
    assert "extension" not in caplog.text
    tiny_model(attn_qk_norm=True).save_pretrained(tmp_path / "extended")
    assert "uses attn_qk_norm: an extension that other servers" in caplog.text


def test_sharded_checkpoints_load(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = MiniCPMSALAForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_every_misfit_is_named(folder):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
        tensors["model.layers.1.self_attn.z_proj.weight"] = torch.ones(8, 32)

    change(folder, edit)
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    text = str(error.value)
    assert "missing model.norm.weight" in text
    assert "unexpected model.layers.0.self_attn.q_norm.weight" in text
    assert (
        "model.layers.1.self_attn.z_proj.weight has shape [8, 32], the configuration asks for [32, 32]"
        in text
    )


def test_corrupt_files_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_truncated_files_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_pickles_are_never_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="never read"):
        MiniCPMSALAForCausalLM.from_pretrained(folder, use_safetensors=False)


def test_attention_mode_can_be_given_when_loading(folder):
    assert (
        AutoModelForCausalLM.from_pretrained(folder, attention_mode="dense").config.attention_mode == "dense"
    )
    with pytest.raises(ValueError, match="attention_mode must be one of"):
        AutoModelForCausalLM.from_pretrained(folder, attention_mode="denser")
