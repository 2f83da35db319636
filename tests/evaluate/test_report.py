"""Reports: published figures and ours in the right columns, pictures that are there, NoLiMa's effective
length."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opensala.evaluate.published import LONG, MODELS, STANDARD, STANDARD_MODELS, ULTRA
from opensala.evaluate.report import write_report
from opensala.evaluate.standard import BENCHMARKS, LIVECODEBENCH
from opensala.evaluate.tables import length_name


def results(folder, rows):
    folder.mkdir()
    common = {"depth": None, "prompt_tokens": 10, "read_tokens": 4, "prediction": "", "references": ["x"]}
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps(common | {"id": f"{n}"} | row) + "\n" for n, row in enumerate(rows))
    )
    (folder / "run.json").write_text(
        json.dumps(
            {"identity": {"model": "abc"}, "suites": {"ruler": {"seed": 0}}, "runs": [{"name": "some/model"}]}
        )
    )
    return folder


def test_report(tmp_path):
    ruler = [
        {"suite": "ruler", "task": task, "length": length, "score": score, "depth": depth}
        for task, score in (("vt", 1.0), ("qa_1", 0.5))
        for length in (4096, 65536)
        for depth in (0.1, 0.9)
    ]
    mrcr = [{"suite": "mrcr", "task": "mrcr_2needle", "length": 65536, "score": 0.25}]
    nolima = [
        {"suite": "nolima", "task": f"nolima_{kind}", "length": length, "score": score}
        for kind, score in (("onehop", 0.8), ("direct", 0.0))
        for length in (1000, 32000)
    ]
    text = write_report([results(tmp_path / "a", [*ruler, *mrcr, *nolima])], tmp_path / "out").read_text()
    assert "|  | 4K | 64K | 128K |" in text and "| **model** | **75.0** (2) | **75.0** (2) |  |" in text
    assert (
        "| MiniCPM-SALA-9B (published) |  | 92.7 | 89.4 |" in text and "| **model** | **25.0** |  |" in text
    )
    assert (
        "NoLiMa base score 80.0; effective length (at least 85% of it at every length): 32K." in text
    )  # direct questions do not count
    assert "52 of 130 prompt tokens" in text
    for name in ("ruler-lengths-1.png", "ruler-depths-1.png", "mrcr-lengths-1.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" and f"]({name})" in text
    assert not (tmp_path / "out" / "mrcr-depths-1.png").exists()
    two = write_report([tmp_path / "a", tmp_path / "a"], tmp_path / "two").read_text()
    assert "## model (2)" in two and "| **model (2)** |" in two


def test_html_says_the_same(tmp_path):
    """One file: every number of the Markdown, pictures inside, nothing fetched from anywhere."""
    rows = [{"suite": "ruler", "task": "vt", "length": n, "score": 0.5, "depth": 0.3} for n in (4096, 65536)]
    folder = results(tmp_path / "a<b", rows)
    markdown = write_report([folder], tmp_path / "out").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert set(re.findall(r"\d+\.\d+", markdown)) <= set(re.findall(r"\d+\.\d+", page))
    assert page.count("<img ") == markdown.count("![") == page.count('src="data:image/png;base64,iVBOR') == 2
    assert (
        "http" not in re.sub('data:image[^"]*', "", page)
        and "a&lt;b/samples.jsonl" in page
        and "|" not in page.split("<body>")[1]
    )
    assert page.count("<table>") == len(re.findall(r"^\|---", markdown, re.M)) and "<b>model</b>" in page
    Parser = type(
        "Parser",
        (HTMLParser,),
        {
            "handle_starttag": lambda self, tag, _: tag in ("meta", "img") or self.open.append(tag),
            "handle_endtag": lambda self, tag: self.open.remove(tag),
        },
    )
    parser = Parser()
    parser.open = []
    parser.feed(page)
    assert not parser.open


def test_standard_table(tmp_path):
    """lm-eval's figures and LiveCodeBench's under the paper's titles; an average only of all ten."""
    figures = {b.task: {b.figure: 0.25, "alias": b.task} for b in BENCHMARKS}
    folder = results(
        tmp_path / "a",
        [
            {"suite": "livecodebench", "task": f"livecodebench_{v}", "length": 0, "score": s}
            for v, s in (("v5", 1), ("v6", 0))
        ],
    )
    (folder / "lm_eval.json").write_text(json.dumps({"results": figures}))
    text = write_report([folder], tmp_path / "out").read_text()
    assert (
        "| LCB-v5 | 56.89 | 68.26 | 56.89 | 65.87 | 67.66 | 60.48 | **100.00** |" in text
        and "| **0.00** |" in text
    )
    assert "| BBH | 74.17 | 74.28 | 82.68 | 64.39 | 63.17 | 81.55 | **25.00** |" in text
    assert "| Average | 73.45 | 73.82 | 76.13 | 74.21 | 76.45 | 76.53 | 30.00 |" in text
    assert "| livecodebench | all |" in text and "![" not in text  # no lengths, so no curves
    del figures["cmmlu"]
    (folder / "lm_eval.json").write_text(json.dumps({"results": figures}))
    text = write_report([folder], tmp_path / "out").read_text()
    assert "| Average | 73.45 | 73.82 | 76.13 | 74.21 | 76.45 | 76.53 |  |" in text
    (folder / "lm_eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"lm_eval\.json, line 1: not JSON"):
        write_report([folder], tmp_path / "out")


def test_figures_are_lm_evals():
    """lm-eval has tasks of these names."""
    lm_eval = pytest.importorskip("lm_eval.tasks")
    text = "".join(
        p.read_text()
        for d in ("cmmlu", "mmlu_pro", "humaneval", "mbpp", "aime", "bbh", "ifeval")
        for p in sorted((Path(lm_eval.__file__).parent / d).rglob("*.y*ml"))
    )
    for benchmark in BENCHMARKS:
        assert re.search(rf"^(task|group): {benchmark.task}$", text, re.M), benchmark
        assert re.search(
            r"(metric: |name: "
            rf"|utils\.)\"?{benchmark.figure.split(',')[0].split('@')[0].replace('pass', 'pass(_at_k)?')}",
            text,
        ), benchmark


def test_report_without_samples(tmp_path):
    with pytest.raises(ValueError, match="no samples in it yet"):
        write_report([results(tmp_path / "a", [])], tmp_path / "out")


def test_published_figures():
    """Averages of the published table follow from its rows: a slip of the pen would show."""
    for i, average in enumerate((32.02, 25.12, 28.18, 16.04, 38.97)):
        column = [scores[i] for lengths in LONG.values() for scores in lengths.values()]
        assert sum(column) / len(column) == pytest.approx(average, abs=0.011), MODELS[i]
    assert all(len(scores) == 4 for scores in ULTRA.values())
    assert set(STANDARD) == {"Average", *LIVECODEBENCH, *(b.title for b in BENCHMARKS)}
    for i, average in enumerate(STANDARD["Average"]):
        assert sum(row[i] for row in STANDARD.values()) - average == pytest.approx(10 * average, abs=0.1), (
            STANDARD_MODELS[i]
        )


def test_names_of_lengths():
    assert [length_name(n) for n in (4096, 65536, 2**20, 2 * 2**20, 1_000_000, 32000, 250)] == [
        "4K",
        "64K",
        "1M",
        "2M",
        "1000K",
        "32K",
        "250",
    ]
