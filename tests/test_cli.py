"""The command line: what goes where, and one line with exit code 2 for every kind of bad input."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from opensala.cli import main

from .conftest import tiny_model

FACT = "The access code for blue-falcon is 48213."
QUESTION = "What is the access code for blue-falcon?"


@pytest.fixture
def document(tmp_path):
    filler = "Nothing of note happened on that day, and nobody wrote anything down.\n" * 60
    path = tmp_path / "report.txt"
    path.write_text(f"{filler}{FACT}\n{filler}")
    return str(path)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["opensala", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_ask_answers_on_stdout_and_measures_on_stderr(monkeypatch, capsys, document):
    code, out, err = run(monkeypatch, capsys, "ask", document, "-q", QUESTION)
    assert (code, out) == (0, "48213\n")
    assert "tokens read, first token after" in err and "sparse layers" in err and "cache" in err


def test_ask_json(monkeypatch, capsys, document):
    code, out, err = run(
        monkeypatch,
        capsys,
        "ask",
        document,
        "-q",
        QUESTION,
        "--json",
        "--quiet",
        "--attention-mode",
        "sparse",
    )
    record = json.loads(out)
    assert code == 0 and record["answer"] == "48213" and err == ""
    assert {
        "prompt_tokens",
        "time_to_first_token",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "peak_memory_bytes",
        "cache_bytes",
    } <= set(record)
    assert "block-sparse" in record["attention"]


def test_ask_several_sources(monkeypatch, capsys, document, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Notes\n\nThe owner of the green boat is Marla Quist.\n")
    code, out, _ = run(
        monkeypatch, capsys, "ask", document, str(tmp_path / "notes"), "-q", QUESTION, "--quiet"
    )
    assert (code, out) == (0, "48213\n")


def test_ask_in_bfloat16(monkeypatch, capsys, document):
    code, out, _ = run(
        monkeypatch,
        capsys,
        "ask",
        document,
        "-q",
        QUESTION,
        "--quiet",
        "--dtype",
        "bfloat16",
        "--max-new-tokens",
        "3",
    )
    assert code == 0 and out.startswith("48")


def test_generate_streams_and_takes_stdin(document):
    done = subprocess.run(
        [sys.executable, "-m", "opensala", "generate", "-", "--max-new-tokens", "5", "--quiet"],
        input=b"import os\nimport sys\n",
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip() and done.stderr == b""


def test_generate_json(monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, "generate", "def main():", "--max-new-tokens", "4", "--json", "--quiet"
    )
    assert code == 0 and json.loads(out)["new_tokens"] <= 4


def test_version(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--version")
    assert code == 0 and out.strip()[0].isdigit()


def refuse(monkeypatch, capsys, message, *arguments):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and out == ""
    err = re.sub(r"^note: dtype auto [^\n]*\n", "", err)  # said as soon as a model is loaded
    assert err.startswith("opensala: ") and err.count("\n") == 1 and "Traceback" not in err
    assert message in err, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "missing.txt", "-q", "x"], "missing.txt: no such file or directory"),
        (["ask", "DOC", "-q", " "], "the question is empty"),
        (["ask", "DOC"], "Missing option '--question'"),
        (["ask", "DOC", "-q", "x", "--topk", "3"], "No such option: --topk"),
        (["ask", "DOC", "-q", "x", "--max-new-tokens", "many"], "Invalid value for '--max-new-tokens'"),
        (["ask", "DOC", "-q", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["ask", "DOC", "-q", "x", "--attention-mode", "sprse"], "Did you mean 'sparse'?"),
        (["ask", "DOC", "-q", "x", "--dtype", "int3"], "dtype must be"),
        (["ask", "DOC", "-q", "x", "--device", "tpu"], "device must be"),
        (["ask", "DOC", "-q", "x", "--model", "./nowhere"], "./nowhere: no such checkpoint folder"),
        (["generate", ""], "the prompt is empty"),
        (["ask", "", "-q", "x"], "a document's name is empty"),
        (["ask", "DOC", "-q", "caf\udce9"], "the question is not valid UTF-8 (character 4)"),
        (["generate", "caf\udce9"], "the prompt is not valid UTF-8 (character 4)"),
        (["answer"], "No such command 'answer'"),
        (["demo", "--tokens", "5"], "should be greater than or equal to 2048"),
    ],
    ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else "",
)
def test_bad_input_ends_with_one_line_and_code_2(monkeypatch, capsys, document, arguments, message):
    refuse(monkeypatch, capsys, message, *(document if a == "DOC" else a for a in arguments))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "empty"), (b"caf\xe9", "not UTF-8"), (b"\xff\xfe\x00\xd8x\0", "not UTF-16"), (b"a\0b", "binary")],
)
def test_undecodable_and_empty_documents(monkeypatch, capsys, tmp_path, data, message):
    (tmp_path / "doc").write_bytes(data)
    refuse(monkeypatch, capsys, message, "ask", str(tmp_path / "doc"), "-q", "x")


def test_a_question_beyond_the_models_limit(monkeypatch, capsys, document, tmp_path):
    from transformers import AutoTokenizer

    from opensala.engine import shipped_model

    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    refuse(
        monkeypatch,
        capsys,
        "the model's limit is 64",
        "ask",
        document,
        "-q",
        "why " * 200,
        "--model",
        str(tmp_path / "m"),
    )


def test_a_prompt_beyond_memory(monkeypatch, capsys, document):
    monkeypatch.setattr("opensala.engine.memory.available_bytes", lambda device: 1 << 20)
    refuse(monkeypatch, capsys, "0 bytes are available for texts on cpu", "ask", document, "-q", QUESTION)
    monkeypatch.setattr("opensala.engine.memory.available_bytes", lambda device: 226_000_000)
    message = (
        r"a prompt of 3,\d+ tokens and an answer of up to 64 need [\d,]+ bytes of cache on cpu, the "
        r"engine has"
    )
    code, out, err = run(monkeypatch, capsys, "ask", document, "-q", QUESTION)
    assert code == 2 and out == "" and re.search(message, err) and "shorten the document" in err


@pytest.mark.parametrize("kind", ["wrong mixers", "heads", "corrupt", "pickle", "other model"])
def test_broken_checkpoints(monkeypatch, capsys, document, tmp_path, kind):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if kind == "wrong mixers":
        config["mixer_types"], message = (
            ["minicpm4"],
            "mixer_types must have num_hidden_layers = 4 entries, got 1",
        )
    elif kind == "heads":
        config["num_key_value_heads"], message = 3, "must be a multiple of num_key_value_heads = 3"
    elif kind == "other model":
        config, message = {"model_type": "llama"}, "a llama model; this command runs minicpm_sala"
    elif kind == "corrupt":
        (tmp_path / "model.safetensors").write_bytes(b"garbage")
        message = "cannot be read as safetensors"
    else:
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        message = "is a pickle"
    (tmp_path / "config.json").write_text(json.dumps(config))
    from opensala.engine import shipped_model

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shipped_model() / name).read_bytes())
    refuse(monkeypatch, capsys, message, "ask", document, "-q", "x", "--model", str(tmp_path))


def test_ctrl_c_leaves_cleanly(monkeypatch, capsys, document):
    def interrupt(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("opensala.engine.runner.Runner.run", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    code, out, err = run(monkeypatch, capsys, "ask", document, "-q", QUESTION)
    assert (
        code == 130
        and out == ""
        and "Traceback" not in err
        and err.rstrip().endswith("opensala: interrupted")
    )
    signal.signal(signal.SIGINT, before)


def test_import_needs_no_extra_and_no_driver():
    blocked = ["triton", "datasets", "accelerate", "peft", "lm_eval", "fastapi", "matplotlib"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); import opensala, opensala.engine, "
        "opensala.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
