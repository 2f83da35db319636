"""scripts/ablate_conversion.py on a tiny teacher: every variant, and that each is what its name says."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from opensala.engine import shipped_model
from opensala.model.config import LIGHTNING

from .conftest import TEXT
from .test_transfer import make_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parents[2] / "scripts" / "ablate_conversion.py"
NAMES = [
    "hype_at_once",
    "hype_faded",
    "rope_kept",
    "uniform",
    "layers_2",
    "layers_4",
    "no_gates",
    "attn_qk_norm",
    "no_qk_norm",
]
BATCH = 2 * 128


@pytest.fixture(scope="module")
def ablate():
    spec = importlib.util.spec_from_file_location("ablate_conversion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def students():
    """Those of `done`, by name, as their distillation left them; and the weights they began with."""
    return {}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A Llama of 8 layers, text in packed tokens, 4 steps of each phase."""
    folder = tmp_path_factory.mktemp("ablate")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    make_teacher(folder / "teacher", "llama", vocab_size=len(tokenizer), num_hidden_layers=8)
    tokenizer.save_pretrained(folder / "teacher")
    np.save(folder / "text.npy", np.array(tokenizer(TEXT)["input_ids"], np.uint16))
    sizes = {"align-tokens": 4 * BATCH, "distill-tokens": 4 * BATCH, "calibrate-tokens": 512, "batch": 2}
    sizes |= {"fade-tokens": 2 * BATCH, "measure-every": 2 * BATCH, "length": 128, "micro-tokens": 256}
    options = [str(folder / "teacher"), "--tokens", str(folder / "text.npy"), "--output", str(folder)]
    options += [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    options += ["--probes", "2", "--layers", "0,2,7", "--fewer", "0,7", "--compute", "float32", "--quiet"]
    return options


@pytest.fixture(scope="module")
def done(ablate, arguments, students):
    """Lines of the file, by variant and seed: all of them with seed 1, the base with seed 2."""
    original = ablate.Ablation.student

    def kept(self, part, variant):
        student = original(self, part, variant)
        start = {name: value.clone() for name, value in student.state_dict().items()}
        students.setdefault(variant.name, (student, start))
        return student

    ablate.Ablation.student = kept
    torch.set_num_threads(1)
    try:
        ablate.main([*arguments, "--seeds", "1"])
        ablate.main([*arguments, "--seeds", "1,2", "--only", "hype_at_once"])
    finally:
        ablate.Ablation.student = original
    lines = (Path(arguments[4]) / "ablations.jsonl").read_text().splitlines()
    return {(record["variant"], record["seed"]): record for record in map(json.loads, lines)}


def test_every_variant_is_measured_once(done):
    assert list(done) == [*((name, 1) for name in NAMES), ("hype_at_once", 2)]
    for record in done.values():
        assert "error" not in record
        assert [tokens for tokens, _ in record["curve"]] == [BATCH * n for n in range(1, 5)]
        assert [point["tokens"] for point in record["measured"]] == [0, 2 * BATCH, 4 * BATCH]
        assert record["final"] == record["measured"][-1]
        if record["variant"] != "hype_faded":  # which begins with the rotation that it loses
            assert record["final"]["kl"] < record["measured"][0]["kl"]
        assert record["alignment"]["aligned"] < record["alignment"]["transferred"]


def test_variants_differ_in_what_they_say(done):
    first = {key: record["curve"][0][1] for key, record in done.items()}
    base = first["hype_at_once", 1]
    assert first["hype_faded", 1] == first["rope_kept", 1] != base  # all of the rotation is left at first
    assert done["hype_faded", 1]["curve"][2:] != done["rope_kept", 1]["curve"][2:]
    assert first["hype_at_once", 2] != base
    layers = {name: done[name, 1]["layers"] for name in NAMES}
    assert layers["layers_2"] == [0, 7] and layers["layers_4"] == [0, 2, 4, 7]
    assert layers["uniform"] == [0, 4, 7]


def test_gates_and_norms_are_gone_where_they_should_be(done, students):
    def mixers(name):
        return [(layer.self_attn, kind) for layer, kind in parts(students[name][0])]

    def parts(student):
        return zip(student.model.layers, student.config.mixer_types, strict=True)

    def gates(state):
        return [v for name, v in state.items() if name.endswith(("z_proj.weight", "o_gate.weight"))]

    assert len(gates(students["no_gates"][1])) == 8
    assert not any(value.any() for value in gates(students["no_gates"][0].state_dict()))
    assert all(value.any() for value in gates(students["hype_at_once"][0].state_dict()))
    for name, kinds in {"hype_at_once": {True}, "no_qk_norm": {False}, "no_gates": {True}}.items():
        assert {hasattr(m, "q_norm") for m, kind in mixers(name) if kind == LIGHTNING} == kinds
    for name, kinds in {"hype_at_once": {False}, "attn_qk_norm": {True}}.items():
        assert {hasattr(m, "q_norm") for m, kind in mixers(name) if kind != LIGHTNING} == kinds
    assert not any(m.rope_share for m, kind in mixers("hype_faded") if kind != LIGHTNING)


def test_variants_begin_with_the_same_mixers(done, students):
    """Distilling one leaves the aligned mixers as they are."""
    name = "model.layers.5.self_attn.q_proj.weight"
    assert torch.equal(students["hype_at_once"][1][name], students["uniform"][1][name])
    assert not torch.equal(students["hype_at_once"][0].state_dict()[name], students["uniform"][1][name])


def test_the_plot_and_the_table(ablate, arguments, done, tmp_path, capsys):
    ablate.main(["--output", arguments[4], "--plot", str(tmp_path / "hype.png")])
    assert (tmp_path / "hype.png").stat().st_size > 5000
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(NAMES) and len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| hype_at_once | 0, 2, 7 | 2 |") and " ± " in rows[2]


def test_no_variant_begins_that_would_not_end_in_time(ablate, arguments, done, capsys):
    before = (Path(arguments[4]) / "ablations.jsonl").read_text()
    ablate.main([*arguments, "--seeds", "1,3", "--seconds", "0.01"])
    assert "no time for hype_at_once, seed 3" in capsys.readouterr().err
    assert (Path(arguments[4]) / "ablations.jsonl").read_text() == before


def test_layers_fill_the_widest_gaps(ablate):
    more = ablate.filled((0, 6, 17, 18, 20, 21, 23, 29), 15)
    assert len(more) == 15 and {0, 6, 11, 17, 18, 20, 21, 23, 26, 29} < set(more)
    with pytest.raises(ValueError, match="leave no room for 5"):
        ablate.filled((0, 3), 5)


def test_what_cannot_be_is_named(ablate, arguments, tmp_path):
    with pytest.raises(SystemExit, match="only: must be among hype_at_once"):
        ablate.main([*arguments, "--only", "no_norm"])
    with pytest.raises(SystemExit, match="holds no finished variant"):
        ablate.main(["--output", str(tmp_path), "--plot", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match=r"distill\.tokens must be at least a batch"):
        ablate.main([*arguments, "--distill-tokens", "5"])
