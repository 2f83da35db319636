"""`opensala quantize` from end to end: what is written, how it is read, and what is refused."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opensala.cli import main
from opensala.engine import Engine, SamplingParams, load_engine, shipped_model
from opensala.model import MiniCPMSALAForCausalLM, SALACache
from opensala.model.quantised import QuantisedLinear, quantised_layers
from opensala.ops.linear.gptq import Codes, to_gptq
from opensala.quantize import Plan, quantise_checkpoint

from ..conftest import two_layer_config

FEW = ["--sequences", "4", "--length", "512", "--questions", "2", "--document-tokens", "512", "--quiet"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny checkpoint with the shipped tokenizer, head not tied."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "source"
    config = two_layer_config(vocab_size=2048, intermediate_size=128)
    MiniCPMSALAForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped_model()).save_pretrained(folder)
    (folder / "LICENSE").write_text("as the source")
    return folder


@pytest.fixture(scope="module")
def quantised(small, tmp_path_factory):
    target = tmp_path_factory.mktemp("quantised") / "int4"
    plan = Plan(str(small), 4, 32, sequences=4, length=256, questions=2, document_tokens=256)
    return target, quantise_checkpoint(plan, target, quiet=True)


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opensala", "quantize", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out = capsys.readouterr()
    return stopped.value.code, out.out, out.err


def test_report_and_files(small, quantised):
    folder, report = quantised
    assert json.loads((folder / "quantization.json").read_text()) == report
    names = {e["name"] for e in report["layers"]}
    assert names == {
        *(f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")),
        *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"),
        *(f"model.layers.1.self_attn.{p}_proj" for p in "qo"),
    }
    assert all(0 < e["error"] < 0.2 for e in report["layers"])
    assert report["share_of_bfloat16"] < 0.35
    assert report["before"]["asked"] == report["after"]["asked"] == 2
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (folder / name).read_bytes() == (small / name).read_bytes(), "byte for byte"
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "gptq" and quantization["checkpoint_format"] == "gptq"
    assert quantization["bits"] == 4 and quantization["group_size"] == 32 and not quantization["lm_head"]
    assert r"-:^model\.layers\.(0)\.self_attn\.o_gate$" in quantization["dynamic"]
    assert r"-:^lm_head$" in quantization["dynamic"] and "auto_map" not in config
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.qweight"].shape == (128 // 8, 64)
    assert set(tensors["model.layers.0.mlp.down_proj.qzeros"].unique().tolist()) == {0x77777777}, (
        "8, stored as 7"
    )
    assert tensors["model.layers.1.self_attn.k_proj.weight"].dtype == torch.bfloat16


def test_loads_through_transformers_and_the_engine(small, quantised):
    folder, _ = quantised
    by_auto = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert len(quantised_layers(by_auto)) == 12
    ids = torch.randint(3, 2048, (1, 40))
    with torch.no_grad():
        ours, source = by_auto(ids).logits, AutoModelForCausalLM.from_pretrained(small).float()(ids).logits
    assert 0.001 < (ours - source).norm() / source.norm() < 0.3
    for dtype in ("auto", "float32", "bfloat16"):
        engine = load_engine(str(folder), device="cpu", dtype=dtype)
        assert len(quantised_layers(engine.model)) == 12
        answer = engine.generate([ids[0].tolist()], SamplingParams(max_tokens=4))[0]
        assert len(answer.tokens) == 4 or answer.finish_reason is not None
    again = folder.parent / "saved again"
    by_auto.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    back = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(back(ids).logits, ours)


def test_one_shot_chunks_and_tokens_agree(quantised):
    model = MiniCPMSALAForCausalLM.from_pretrained(quantised[0], dtype=torch.float32).eval()
    ids = torch.randint(3, 2048, (1, 50))
    with torch.no_grad():
        whole = model(ids).logits
        cache = SALACache(model.config)
        cache.begin_prompt([50], 0)
        parts = [model(input_ids=p, past_key_values=cache, use_cache=True).logits for p in ids.split(7, 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def by_hand(folder, target, layout, bits=4, group=64):
    """A checkpoint as another tool writes it: random codes and zero points in one layer, from the format's
    description; returns the weights it stands for."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    outer, inner = tensors.pop(f"{name}.weight").shape
    torch.manual_seed(4)
    codes = Codes(
        torch.randint(0, 1 << bits, (outer, inner), dtype=torch.int32),
        (0.01 * torch.rand(outer, inner // group)).half().float(),
        torch.randint(1, 1 << bits, (outer, inner // group), dtype=torch.int32),
        torch.arange(inner) // group,
    )
    tensors |= {f"{name}.{own}": x for own, x in to_gptq(codes, bits, layout)._asdict().items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False},
        **({"checkpoint_format": layout} if layout != "gptq" else {}),
    }
    (target / "config.json").write_text(json.dumps(config))
    return codes.weights()


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_of_another_writer(small, tmp_path, layout, bits):
    weights = by_hand(small, tmp_path / "theirs", layout, bits)
    model = MiniCPMSALAForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantisedLinear) and len(quantised_layers(model)) == 1
    x = torch.randn(5, 64)
    assert torch.allclose(layer(x), x @ weights.T, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_packed_for_the_compiled_product(bits, sym):
    """The same layer in either form: outputs, what is saved, and after it was moved."""
    torch.manual_seed(2)
    middle = torch.full((24, 2), 1 << bits - 1, dtype=torch.int32)
    codes = Codes(
        torch.randint(0, 1 << bits, (24, 64), dtype=torch.int32),
        (0.1 * torch.rand(24, 2)).half().float(),
        middle if sym else torch.randint(1, 1 << bits, (24, 2), dtype=torch.int32),
        torch.arange(64) // 32,
    )
    layer = QuantisedLinear.of(codes, torch.randn(24), bits=bits, group=32)
    saved = {name: x.clone() for name, x in layer.state_dict().items()}
    x = torch.randn(5, 64)
    plain = layer(x)  # gradients are enabled: by the weights written out
    with torch.no_grad():
        packed = layer(x)
    assert layer.pack() is not None and layer.qweight is None, "one form at a time"
    assert torch.allclose(packed, plain, atol=1e-5)
    assert all(torch.equal(saved[name], x) for name, x in layer.state_dict().items())
    assert {*layer.state_dict()} == {*saved}
    assert torch.allclose(layer.double()(x.double()).float(), plain, atol=1e-5)


def test_many_rows_in_16_bits_where_they_are_faster():
    codes = Codes(
        torch.randint(0, 16, (16, 32), dtype=torch.int32),
        (0.1 * torch.rand(16, 2)).half().float(),
        torch.full((16, 2), 8, dtype=torch.int32),
        torch.arange(32) // 16,
    )
    layer, x = QuantisedLinear.of(codes, None, bits=4, group=16), torch.randn(200, 32)
    with torch.no_grad():
        exact = layer(x)
        layer.half_rows = 128
        rounded = layer(x)
        assert torch.equal(layer(x[:100]), exact[:100]), "few rows stay exact"
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 1e-2


def test_columns_in_another_order_are_computed_all_the_same():
    codes = Codes(
        torch.randint(0, 16, (16, 32), dtype=torch.int32),
        torch.rand(16, 2).half().float(),
        torch.full((16, 2), 8, dtype=torch.int32),
        torch.tensor([0, 1] * 16),
    )
    layer, x = QuantisedLinear.of(codes, None, bits=4, group=16), torch.randn(3, 32)
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ codes.weights().T, atol=1e-5) and layer.pack() is None


def test_kinds(small, tmp_path, monkeypatch, capsys):
    few = [str(small), "--group-size", "64", *FEW]
    code, out, err = run(
        [*few, "-o", str(tmp_path / "a"), "--kinds", "gates,head,state"], monkeypatch, capsys
    )
    assert code == 0, err
    assert set(quantised_layers(load_engine(str(tmp_path / "a")).model)) == {
        "lm_head",
        "model.layers.0.self_attn.o_gate",
        "model.layers.1.self_attn.z_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    }


@pytest.mark.parametrize(
    "options, said",
    [
        (["--bits", "3"], "--bits must be 4 or 8, got 3"),
        (["--group-size", "0"], "--group-size must be at least 1, or -1 for whole rows, got 0"),
        (["--group-size", "48"], "a group of 48 does not divide the 64 columns"),
        (["--kinds", "mlp"], "--kinds must name some of feed-forward, .* got 'mlp'"),
        (["--kinds", ","], "--kinds must name some of"),
        (["--length", "1"], "--length must be at least 64, got 1"),
    ],
)
def test_bad_input(small, tmp_path, options, said, monkeypatch, capsys):
    code, _, err = run([str(small), "-o", str(tmp_path / "x"), *FEW[:4], *options], monkeypatch, capsys)
    assert code == 2 and re.search(said, err), err
    assert not (tmp_path / "x").exists()


def test_a_quantised_model_is_not_quantised_again(quantised, tmp_path, monkeypatch, capsys):
    code, _, err = run([str(quantised[0]), "-o", str(tmp_path / "x"), *FEW], monkeypatch, capsys)
    assert code == 2 and "is quantised already" in err
    code, _, err = run([str(quantised[0]), "-o", str(quantised[0]), *FEW], monkeypatch, capsys)
    assert code == 2 and "exists: name a new folder" in err


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda t, n: t.pop(f"{n}.scales"), "missing .*scales"),
        (lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"][:-1].clone()}), "qweight has shape"),
        (lambda t, n: t[f"{n}.scales"].fill_(float("inf")), "scales holds numbers that are not finite"),
        (lambda t, n: t[f"{n}.g_idx"].fill_(77), "g_idx names groups outside 0..1"),
        (
            lambda t, n: [t.pop(k) for k in list(t) if "qweight" in k],
            "no file of it has a tensor named qweight",
        ),
    ],
)
def test_damaged_files(quantised, tmp_path, damage, said):
    shutil.copytree(quantised[0], tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    damage(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        MiniCPMSALAForCausalLM.from_pretrained(tmp_path / "damaged")


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("bits", 3, "quantization_config.bits must be 4 or 8, got 3"),
        ("bits", None, "quantization_config.bits must be 4 or 8, got None"),
        ("group_size", 0, "quantization_config.group_size must be -1 or at least 1, got 0"),
        ("checkpoint_format", "marlin", "checkpoint_format must be one of 'gptq', 'gptq_v2', got 'marlin'"),
    ],
)
def test_settings_that_are_not_read(quantised, tmp_path, field, value, said):
    shutil.copytree(quantised[0], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"][field] = value
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        load_engine(str(tmp_path / "other"))


def test_an_engine_keeps_its_promise_on_quantised_weights(quantised):
    """What a sequence gets does not depend on the others."""
    model = MiniCPMSALAForCausalLM.from_pretrained(quantised[0], dtype=torch.float32)
    engine = Engine(model, None)
    prompts = [torch.randint(3, 2048, (n,)).tolist() for n in (5, 90, 33)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    together = [c.tokens for c in engine.generate(prompts, params)]
    assert together == [engine.generate([p], params)[0].tokens for p in prompts]
