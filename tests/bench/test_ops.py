"""The benchmark of the ops on a CPU from end to end, at sizes that take seconds."""

import csv
import json

import pytest
import torch

from opensala.bench import cases, ops
from opensala.bench.record import Report
from opensala.bench.timing import take_turns

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """A kilo of 8: 64K tokens are 512; one round of each."""
    monkeypatch.setattr(ops, "K", 8)
    monkeypatch.setattr(
        cases, "take_turns", lambda works, device, *_, **__: take_turns(works, device, 0.0, most=1)
    )
    monkeypatch.setattr(
        ops, "measure_roofline", lambda report, quick: {"float32": 1e11, "bfloat16": 1e11, "copy": 1e10}
    )


def test_the_command_writes_rows_and_ends_with_json(small, tmp_path, capsys):
    ops.run(quick=True, device="cpu", rows=tmp_path / "rows.csv")
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(result) == {"rows", "targets", "notes", "machine"}
    names = {(r["op"], r["pass"]) for r in result["rows"]}
    assert {
        ("lightning_attention", "forward"),
        ("lightning_attention", "backward"),
        ("lightning_attention", "decode"),
        ("select_blocks", "forward"),
        ("sparse_attention", "forward"),
        ("sparse_attention", "backward"),
        ("sparse step", "decode"),
        ("scaled_dot_product_attention", "forward"),
        ("norm_rope", "forward"),
        ("norm_gate", "forward"),
    } <= names
    assert all(
        r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] and r["p50_ms"] > 0 and r["runs"] >= 1
        for r in result["rows"]
    )
    for target in result["targets"]:
        assert set(target) == {"name", "value", "target", "ok"} and target["value"] > 0
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])


def test_the_whole_on_a_cpu(small, monkeypatch):
    """Not quick: the longer shapes and the shipped model with its twin, all eight targets of the table but a
    million tokens."""
    report = Report(CPU)
    ops._cpu(report, quick=False)
    assert len(report.targets) == 9
    assert {r["backend"] for r in report.rows if r["op"] == "first token"} == {
        "shipped model",
        "full-attention twin",
    }
