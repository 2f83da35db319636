"""`opensala bench speed`: turns, rows, what is left out, targets; one real contender from end to end."""

import csv
import json
import os
import stat
import sys

import pytest
import torch

from opensala.bench import counts
from opensala.bench.record import Report
from opensala.bench.speed import contenders, llama_setup, process, run, table, targets
from opensala.bench.speed.gguf_twin import shapes, write_twin
from opensala.bench.speed.parts import part_floors
from opensala.bench.speed.presets import K, preset
from opensala.bench.speed.run import Options
from opensala.cli import main

ROOFLINE = {"float32": 1e11, "bfloat16": 2e11, "copy": 1e10}


class Fake:
    """A contender whose pieces take one second for each token and one for each thousand tokens before."""

    asked: list[tuple[str, str]] = []
    fails: dict[str, int] = {}  # name -> length from which it has no memory

    def __init__(self, contender, *_):
        self.contender, self.oom, self.said, self.before = contender, "", {"dtype": "as asked"}, 0

    def ask(self, op, **values):
        Fake.asked.append((self.contender.name, op))
        if op == "start":
            self.before = 0
            if values["tokens"] >= Fake.fails.get(self.contender.name, 1 << 60):
                self.oom = "no memory"
            return {}
        if op == "read":
            seconds = values["count"] * (1 + self.before / 1000)
            self.before += values["count"]
            return {"seconds": seconds}
        if op == "decode":
            return {"seconds": [0.002] * values["count"]}
        return {"cache": 2**21, "peak": 2**30, "parts": {"opensala_linear": 1.0, "rest": 1.0}}

    def kill(self):
        Fake.asked.append((self.contender.name, "kill"))


@pytest.fixture
def fake(monkeypatch):
    Fake.asked, Fake.fails = [], {}
    monkeypatch.setattr(run, "Process", Fake)
    monkeypatch.setattr(run, "find_python", lambda _: "python")
    monkeypatch.setattr(run, "write_twin", lambda *_: None)
    monkeypatch.setattr(run, "PIECE", 100)
    monkeypatch.setattr(run, "measure_roofline", lambda *_, **__: ROOFLINE)


def test_pieces_and_steps_take_turns(fake, tmp_path, capsys):
    names = ("sala-bfloat16", "llama.cpp-F16")
    report = run.run(Options("quick", (200,), names, generate=8), tmp_path / "rows.csv")
    ops = [(n, op) for n, op in Fake.asked if op in ("read", "decode")][:10]
    assert ops[:4] == [(n, "read") for _ in range(2) for n in names]
    assert ops[6:] == [(n, "decode") for _ in range(2) for n in names], "after a first step of each"
    row = report.rows[0]
    assert row["first_s"] == 100 + 110 and row["status"] == "measured" and row["generated"] == 4
    assert row["end_to_end_s"] == pytest.approx(210 + 1023 * 0.002, rel=1e-3)
    assert row["cache_mib"] == 2 and row["peak_mib"] == 1024
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(result) == {"rows", "targets", "notes", "machine"} and "features" in result["machine"]
    assert all({*t} == {"name", "value", "target", "ok"} for t in result["targets"])
    with (tmp_path / "rows.csv").open() as file:
        assert [r["contender"] for r in csv.DictReader(file)] == list(names)
    assert Fake.asked[-2:] == [(n, "kill") for n in reversed(names)]


def test_out_of_memory_is_a_row(fake, tmp_path, capsys):
    Fake.fails = {"llama.cpp-F16": 300}
    names = ("sala-bfloat16", "llama.cpp-F16")
    report = run.run(Options("quick", (200, 300, 400), names), tmp_path / "rows.csv")
    found = {(r["contender"], r["tokens"]): r["status"] for r in report.rows}
    assert found["llama.cpp-F16", 200] == "measured"
    assert found["llama.cpp-F16", 300] == found["llama.cpp-F16", 400] == "OOM (no memory)"
    assert all(found["sala-bfloat16", n] == "measured" for n in (200, 300, 400))
    assert "OOM" in capsys.readouterr().err


def test_what_would_take_too_long_is_left_out(fake, tmp_path):
    """200 tokens took 210 s; 1,000 would take 1,000 + 100 (1 + ... + 9) / 10 = 1,450."""
    options = Options("quick", (200, 1000), ("sala-bfloat16",), limit=1400)
    rows = run.run(options, tmp_path / "rows.csv").rows
    assert rows[1]["status"] == "left out: about 1,450 s" and rows[1]["first_s"] == ""
    assert table.cell(rows[1], "first_s") == "-" and table.cell(rows[0], "first_s") == "210"


def test_a_dense_model_that_cannot_fit_is_not_started(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "available_bytes", lambda _: 1 << 20)
    rows = run.run(Options("quick", (4096,), ("transformers-float32",)), tmp_path / "rows.csv").rows
    assert (
        rows[0]["status"].startswith("OOM (needs 0.0") and ("transformers-float32", "start") not in Fake.asked
    )


def row(name, tokens, first, step):
    return {
        "contender": name,
        "tokens": tokens,
        "first_s": first,
        "step_p50_ms": step,
        "status": "measured",
    }


def test_targets():
    rows = [
        row("sala-bfloat16", 2 * K, 1.0, 3.0),
        row("llama.cpp-F16", 2 * K, 0.9, 3.0),
        row("sala-bfloat16", 32 * K, 10.0, 4.0),
        row("llama.cpp-F16", 32 * K, 40.0, 6.0),
        row("sala-bfloat16", 4 * K, 1.0, 3.0),
        row("sala-bfloat16", 256 * K, 100.0, 4.5),
        row("sala-int4", 4 * K, 1.0, 2.0),
        row("sala-float32", 4 * K, 1.0, 4.0),
    ]
    found = {t.name: (t.value, t.target, t.ok) for t in targets.targets_of(rows, preset("quick"), ROOFLINE)}
    assert found == {
        "first token at 2K, llama.cpp F16 over ours bfloat16": (0.9, 0.8, True),
        "step at 32K, llama.cpp F16 over ours bfloat16": (1.5, 2.0, False),
        "first token at 32K, llama.cpp F16 over ours bfloat16": (4.0, 3.0, True),
        "step at 256K over 4K, bfloat16": (1.5, 1.3, False),
        "step at 4K, float32 over int4": (2.0, 1.5, True),
    }


def test_floors_of_the_parts():
    parts = ("products", "lightning", "attention", "selection")
    floors = part_floors(preset("135m"), 8192, 4096, dict.fromkeys(parts, 1e11))
    assert set(floors) == set(parts)
    products = 2 * 4096 * counts.product_weights(preset("135m").hybrid)
    assert floors["products"] == pytest.approx(products / 1e11)
    faster = part_floors(preset("135m"), 8192, 4096, dict.fromkeys(parts, 1e11) | {"attention": 4e11})
    assert faster == floors | {"attention": pytest.approx(floors["attention"] / 4)}


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_our_contender(weights):
    made = contenders.Hybrid(preset("quick"), weights, torch.device("cpu"))
    for _ in range(2):
        made.start(5000, 4)
        made.read(4096)
        parts = made.parts(lambda: made.read(904))
        assert parts["opensala_linear"] > 0 and parts["rest"] > 0
        for _ in range(3):
            made.decode()
        sequence = made.engine.sequence(made.request)
        assert sequence is not None and len(sequence.tokens) == 5004, "four tokens, the first by reading"
        assert made.cache_bytes(5000) > 0


def test_a_dense_contender():
    made = contenders.Dense(preset("quick"), "float32", torch.device("cpu"))
    made.start(300, 4)
    made.read(200)
    made.read(100)
    made.decode()
    config = made.model.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert made.cache_bytes(300) == 301 * kv


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_the_twin_as_a_file(kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    config = preset("quick").dense
    write_twin(config, kind, tmp_path / "twin.gguf")
    read = gguf.GGUFReader(tmp_path / "twin.gguf")
    found = {t.name: (t.tensor_type.name, tuple(t.shape.tolist()[::-1])) for t in read.tensors}
    assert found == {n: ("F32" if len(s) == 1 else kind, s) for n, s in shapes(config)}
    assert read.fields["llama.vocab_size"].contents() == config.vocab_size


def test_the_command(tmp_path, monkeypatch, capsys):
    """One real worker, as a user starts it."""
    rows = tmp_path / "rows.csv"
    words = [
        "bench",
        "speed",
        "--quick",
        "--lengths",
        "128",
        "--against",
        "sala-float32",
        "--rows",
        str(rows),
    ]
    monkeypatch.setattr(sys, "argv", ["opensala", *words, "--plots", str(tmp_path / "plots")])
    pytest.importorskip("matplotlib", reason="the extra eval is not installed")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (only,) = result["rows"]
    assert only["tokens"] == 128 and only["first_s"] > 0 and only["peak_mib"] > 50
    assert any(note.startswith("part products: ") for note in result["notes"])
    assert len(list((tmp_path / "plots").glob("speed-*.png"))) == 5


@pytest.mark.parametrize(
    "words, said",
    [
        (["--against", "vllm"], "--against must name some of sala-float32, .* got 'vllm'"),
        (["--preset", "7b"], "--preset must be 135m, small, 9b or quick, got '7b'"),
        (["--lengths", "1x"], "--lengths: must be whole numbers of tokens"),
        (["--lengths", "8"], "--lengths must be at least 64 tokens, got 8"),
        (["--generate", "1"], "--generate must be at least 4, got 1"),
    ],
)
def test_bad_input(words, said, tmp_path, monkeypatch, capsys):
    import re

    monkeypatch.setattr(
        sys, "argv", ["opensala", "bench", "speed", *words, "--rows", str(tmp_path / "r.csv")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and re.search(said, capsys.readouterr().err)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_llama_cpp_that_is_not_there(tmp_path, monkeypatch, fake):
    monkeypatch.setenv("OPENSALA_CACHE", str(tmp_path))
    monkeypatch.delenv(llama_setup.VARIABLE, raising=False)
    assert llama_setup.find_python() is None
    broken = script(tmp_path / "python", "echo no such module >&2; exit 1")
    with pytest.raises(ValueError, match=r"cannot import llama_cpp \(no such module\): run `opensala bench"):
        llama_setup.find_python(broken)
    monkeypatch.setenv(llama_setup.VARIABLE, script(tmp_path / "good", "exit 0"))
    assert llama_setup.find_python() == str(tmp_path / "good")
    monkeypatch.setattr(run, "find_python", lambda _: None)
    with pytest.raises(ValueError, match="llama.cpp is not here: `opensala bench llama-cpp` builds it"):
        run.run(Options("quick", (200,), ("llama.cpp-F16",)), tmp_path / "r.csv")
    report = run.run(Options("quick", (200,)), tmp_path / "r.csv")
    assert not any(r["contender"].startswith("llama") for r in report.rows)
    assert any("llama.cpp is not here" in note for note in report.notes)


def test_a_worker_that_the_system_ends(tmp_path):
    """Killed for want of memory: a result. Ended otherwise: a defect."""
    contender = process.CONTENDERS["llama.cpp-F16"]

    def started(text):
        python = script(tmp_path / "python", f'[ "$1" = -c ] && exit 0; {text}')
        return process.Process(contender, "quick", "cpu", 1, tmp_path / "x.gguf", python)

    worker = started('echo "{}"; read line; kill -9 $$')
    assert worker.ask("start", tokens=1, new=1) == {} and worker.oom == process.DIED
    assert worker.ask("read", count=1) == {}
    worker.close()
    with pytest.raises(ValueError, match="llama.cpp-F16 ended with exit code 3"):
        started("exit 3")


def test_llama_cpp_reads_the_twin(tmp_path):
    """With llama.cpp where the variable says."""
    if not os.environ.get(llama_setup.VARIABLE):
        pytest.skip(f"{llama_setup.VARIABLE} names no Python that has llama.cpp")
    write_twin(preset("quick").dense, "Q4_0", tmp_path / "twin.gguf")
    worker = process.Process(process.CONTENDERS["llama.cpp-Q4_0"], "quick", "cpu", 1, tmp_path / "twin.gguf")
    worker.ask("start", tokens=300, new=4)
    assert worker.ask("read", count=300)["seconds"] > 0
    assert len(worker.ask("decode", count=3)["seconds"]) == 3
    assert worker.ask("end", tokens=300)["peak"] > 0
    worker.close()
    report = Report(torch.device("cpu"))
    assert "features" in report.machine
