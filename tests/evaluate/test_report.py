"""Reports: published figures and ours in the right columns, pictures that are there, NoLiMa's effective length."""

import json

import pytest

from opensala.evaluate.published import LONG, MODELS, ULTRA
from opensala.evaluate.report import write_report
from opensala.evaluate.tables import length_name


def results(folder, rows):
    folder.mkdir()
    common = {"depth": None, "prompt_tokens": 10, "read_tokens": 4, "prediction": "", "references": ["x"]}
    (folder / "samples.jsonl").write_text("".join(json.dumps(common | {"id": f"{n}"} | row) + "\n" for n, row in enumerate(rows)))
    (folder / "run.json").write_text(json.dumps({"identity": {"model": "abc"}, "suites": {"ruler": {"seed": 0}}, "runs": [{"name": "some/model"}]}))
    return folder


def test_report(tmp_path):
    ruler = [{"suite": "ruler", "task": task, "length": length, "score": score, "depth": depth}
             for task, score in (("vt", 1.0), ("qa_1", 0.5)) for length in (4096, 65536) for depth in (0.1, 0.9)]
    mrcr = [{"suite": "mrcr", "task": "mrcr_2needle", "length": 65536, "score": 0.25}]
    nolima = [{"suite": "nolima", "task": f"nolima_{kind}", "length": length, "score": score}
              for kind, score in (("onehop", 0.8), ("direct", 0.0)) for length in (1000, 32000)]
    text = write_report([results(tmp_path / "a", [*ruler, *mrcr, *nolima])], tmp_path / "out").read_text()
    assert "|  | 4K | 64K | 128K |" in text and "| **model** | **75.0** (2) | **75.0** (2) |  |" in text
    assert "| MiniCPM-SALA-9B (published) |  | 92.7 | 89.4 |" in text and "| **model** | **25.0** |  |" in text
    assert "NoLiMa base score 80.0; effective length (at least 85% of it at every length): 32K." in text  # direct questions do not count
    assert "52 of 130 prompt tokens" in text
    for name in ("ruler-lengths-1.png", "ruler-depths-1.png", "mrcr-lengths-1.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" and f"]({name})" in text
    assert not (tmp_path / "out" / "mrcr-depths-1.png").exists()
    two = write_report([tmp_path / "a", tmp_path / "a"], tmp_path / "two").read_text()
    assert "## model (2)" in two and "| **model (2)** |" in two


def test_report_without_samples(tmp_path):
    with pytest.raises(ValueError, match="no samples in it yet"):
        write_report([results(tmp_path / "a", [])], tmp_path / "out")


def test_published_figures():
    """Averages of the published table follow from its rows: a slip of the pen would show."""
    for i, average in enumerate((32.02, 25.12, 28.18, 16.04, 38.97)):
        column = [scores[i] for lengths in LONG.values() for scores in lengths.values()]
        assert sum(column) / len(column) == pytest.approx(average, abs=0.011), MODELS[i]
    assert all(len(scores) == 4 for scores in ULTRA.values())


def test_names_of_lengths():
    assert [length_name(n) for n in (4096, 65536, 2**20, 2 * 2**20, 1_000_000, 32000, 250)] == ["4K", "64K", "1M", "2M", "1000K", "32K", "250"]
