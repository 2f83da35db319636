"""The benchmark of the ops on a CPU from end to end, at sizes that take seconds."""

import csv
import json

import pytest
import torch

from opensala.bench import cases, ops
from opensala.bench.record import Report
from opensala.bench.timing import take_turns

CPU = torch.device("cpu")
UNIT = 8  # tokens of a K: 64K are 512


@pytest.fixture
def small(monkeypatch):
    """One round of each, no products of large matrices."""
    monkeypatch.setattr(
        cases, "take_turns", lambda works, device, *_, **__: take_turns(works, device, 0.0, most=1)
    )
    monkeypatch.setattr(
        ops, "measure_roofline", lambda report, quick: {"float32": 1e11, "bfloat16": 1e11, "copy": 1e10}
    )


def test_the_command_writes_rows_of_both_dtypes_and_ends_with_json(small, tmp_path, capsys):
    ops.run(quick=True, device="cpu", rows=tmp_path / "rows.csv", unit=UNIT)
    out, err = capsys.readouterr()
    assert "results in float32 against float64, 3e-05" in err  # before anything is timed
    assert "results in bfloat16 against float64, 2e-02" in err
    result = json.loads(out.strip().splitlines()[-1])
    assert set(result) == {"rows", "targets", "notes", "machine"}
    found = {
        dtype: {(r["op"], r["pass"]) for r in result["rows"] if r["dtype"] == dtype}
        for dtype in ("float32", "bfloat16")
    }
    names = found["float32"]
    assert names == found["bfloat16"]
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
    assert len(result["targets"]) == 3 and "K stands for 8 tokens" in result["notes"][0]
    for target in result["targets"]:
        assert set(target) == {"name", "value", "target", "ok"} and target["value"] > 0
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])


def test_what_differs_in_bfloat16_is_not_timed(small, tmp_path, monkeypatch):
    from opensala.bench import verify

    wrong = lambda device, dtype, backend, shorten: 0.1 if dtype == torch.bfloat16 else 0.0  # noqa: E731
    monkeypatch.setattr(verify, "_norm_gate", wrong)
    with pytest.raises(ValueError, match="norm_gate is not timed: .* in torch.bfloat16"):
        ops.run(quick=True, device="cpu", rows=tmp_path / "rows.csv", unit=UNIT)
    assert not (tmp_path / "rows.csv").exists()


def test_the_whole_on_a_cpu(small, monkeypatch):
    """Not quick: the longer shapes and the shipped model with its twin, all eight targets of the table but a
    million tokens."""
    report = Report(CPU)
    ops._cpu(report, quick=False, unit=UNIT)
    assert len(report.targets) == 9
    assert {r["dtype"] for r in report.rows} == {"float32", "bfloat16"}
    assert {r["backend"] for r in report.rows if r["op"] == "first token"} == {
        "shipped model",
        "full-attention twin",
    }
