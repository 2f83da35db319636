"""Runs: shared documents give the answers of lone prompts, results survive kill -9, wrong asks are
refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import pairwise

import pytest

from opensala.cli import main
from opensala.data.prompts import PromptFormat
from opensala.data.ruler import ruler_task
from opensala.engine import EngineOptions, SamplingParams, load_engine
from opensala.evaluate.results import Results, read_samples, summarize
from opensala.evaluate.ruler import RulerFiles, RulerSuite
from opensala.evaluate.suites import Options, build_suites, split_names
from opensala.evaluate.work import evaluate
from opensala.runs import FolderLock

from ..runs.test_folder import small_files

RULES = {"identity": {"model": "a"}, "suites": {"ruler": {"seed": 0}}, "run": {}}


@pytest.fixture(scope="module")
def engine():
    return load_engine(options=EngineOptions(max_cached_tokens=40_000))


def lone(engine, prompt, tokens):
    return load_engine(options=engine.options).generate([prompt], SamplingParams(max_tokens=tokens))[0].text


def test_shared_reading_gives_the_answers_of_lone_prompts(engine):
    """On either side of dense_len (4,096), and with prompts on both sides of it."""
    form = PromptFormat(engine.tokenizer)
    for length in (1024, 6000):
        fitted = ruler_task("niah_multikey_1").document(length, form, questions=3)
        answers = engine.generate(fitted.prompts, SamplingParams(max_tokens=12))
        assert [a.text for a in answers] == [lone(engine, p, 12) for p in fitted.prompts]
        assert answers[0].reuse.computed == len(fitted.prompts[0])
        assert all(a.reuse.computed < 60 for a in answers[1:])
        references = [q.references[0] for q in fitted.document.questions]
        assert sum(r in a.text for r, a in zip(references, answers, strict=True)) >= 2
    ids = engine.tokenizer("A b c. " * 2100, add_special_tokens=False)["input_ids"]
    both = [ids[:4090], ids[:4100]]
    answers = engine.generate(both, SamplingParams(max_tokens=4))
    assert [a.text for a in answers] == [lone(engine, p, 4) for p in both]
    assert [a.reuse.computed for a in answers] == [4090, 4100]


def test_a_run_writes_what_it_did(engine, tmp_path):
    suite = RulerSuite(("niah_single_1", "qa_1", "fwe"), (1024,), samples=2, questions=2)
    summary = evaluate(engine, [suite], tmp_path)
    rows = read_samples(tmp_path)
    assert [r["id"] for r in rows] == [
        "niah_single_1/1024/0/0",
        "niah_single_1/1024/0/1",
        "qa_1/1024/0/0",
        "qa_1/1024/0/1",
        "fwe/1024/0/0",
        "fwe/1024/1/0",
    ]
    assert summary["read_tokens"] < 0.75 * summary["prompt_tokens"]
    assert not list(engine.scheduler.tree.held_pages())  # no document stays in memory
    header = json.loads((tmp_path / "run.json").read_text())
    assert {"model", "tokenizer", "attention mode", "dtype"} <= set(header["identity"])
    assert header["suites"]["ruler"]["seed"] == 0 and header["runs"][0]["torch"] == version("torch")
    assert json.loads((tmp_path / "summary.json").read_text())["suites"] == summary["suites"]
    before = (tmp_path / "samples.jsonl").read_text()
    evaluate(engine, [suite], tmp_path)  # nothing is left to do
    assert (tmp_path / "samples.jsonl").read_text() == before
    evaluate(
        engine, [RulerSuite(("niah_single_1",), (1024,), samples=3, questions=2)], tmp_path
    )  # one more sample
    rows = read_samples(tmp_path)
    assert len(rows) == 7 and rows[-1]["id"] == "niah_single_1/1024/1/0"
    with pytest.raises(ValueError, match="ruler: seed is 0 there, now it would be 1"):
        evaluate(engine, [RulerSuite(("qa_1",), (1024,), seed=1)], tmp_path)


def test_kill_loses_at_most_one_sample(tmp_path):
    """kill -9 in the middle; the rerun goes on, and ends with the rows of a run nobody disturbed."""
    command = [
        sys.executable,
        "-m",
        "opensala",
        "eval",
        "--suite",
        "niah_single_1,niah_multikey_2",
        "--lengths",
        "1024",
        "--samples",
        "6",
        "--quiet",
        "--json",
        "--no-cache",
        "-o",
    ]
    samples = tmp_path / "killed" / "samples.jsonl"

    def lines():
        return samples.read_bytes().count(b"\n") if samples.exists() else 0

    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while lines() < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 4 <= lines() < 12
    kept = samples.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    assert samples.read_bytes().startswith(kept)  # what was there was not run again
    rows, whole = read_samples(tmp_path / "killed"), read_samples(tmp_path / "whole")
    for row in (*rows, *whole):
        row.pop("seconds")
    assert rows == whole and len(rows) == 12


def test_a_torn_line_is_dropped(tmp_path):
    results = Results(tmp_path, **RULES)
    row = {
        "id": "a",
        "suite": "ruler",
        "task": "vt",
        "length": 1024,
        "prediction": "x\u2028y",
        "references": ["x"],
        "score": 1.0,
        "prompt_tokens": 3,
        "read_tokens": 3,
    }
    results.add(row)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"id": "b", "sui')
    assert list(Results(tmp_path, **RULES).rows) == ["a"]
    assert (tmp_path / "samples.jsonl").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 1: not JSON"),
        ('{"id": "a"}', "line 1: field 'task' is missing"),
        (
            '{"id": "a", "suite": "ruler", "task": "vt", "length": 1, "prediction": "", "references": '
            '["x"], "score": 7}',
            "'score' must be a number from 0 to 1",
        ),
    ],
)
def test_broken_results(tmp_path, line, message):
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path)
    with pytest.raises(ValueError, match="no run.json"):
        Results(tmp_path, **RULES)


def test_other_results_are_not_mixed(tmp_path):
    Results(tmp_path, **RULES)
    with pytest.raises(
        ValueError, match="model is 'a' there, now it would be 'b'; name another folder with -o"
    ):
        Results(tmp_path, **(RULES | {"identity": {"model": "b"}}))


def test_averages():
    base = {"suite": "ruler", "length": 1024, "prompt_tokens": 10, "read_tokens": 5}
    summary = summarize(
        [base | {"task": "vt", "score": s} for s in (0.0, 1.0, 1.0, 1.0)]
        + [base | {"task": "cwe", "score": 0.25}]
    )
    table = summary["suites"]["ruler"]
    assert table["tasks"]["vt"] == {"1024": {"score": 75.0, "samples": 4}} and table["average"] == {
        "1024": {"score": 50.0, "tasks": 2}
    }
    assert summary["read_tokens"] == 25


def test_rulers_own_files(engine, tmp_path):
    """The layout that RULER's scripts write: the prompt is input and answer_prefix, whatever else is in a
    line."""
    form = PromptFormat(engine.tokenizer)
    document = ruler_task("niah_single_1").document(1024, form).document
    line = {
        "index": 553,
        "input": form.question(document.text, document.questions[0].text)
        .removesuffix(" Answer:")
        .removesuffix("\nAnswer:"),
        "outputs": list(document.questions[0].references),
        "length": 1024,
        "length_w_model_temp": 1024,
        "answer_prefix": "\nAnswer:",
        "token_position_answer": 553,
    }
    (tmp_path / "niah_single_1").mkdir()
    (tmp_path / "niah_single_1" / "validation.jsonl").write_text(json.dumps(line) + "\n")
    summary = evaluate(engine, [RulerFiles(tmp_path)], tmp_path / "out")
    assert summary["suites"]["ruler"]["tasks"] == {"niah_single_1": {"1024": {"score": 100.0, "samples": 1}}}
    with pytest.raises(ValueError, match=r"holds no TASK/validation\.jsonl"):
        RulerFiles(tmp_path / "out")
    del line["answer_prefix"]
    (tmp_path / "niah_single_1" / "validation.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 1: field 'answer_prefix' is missing"):
        RulerFiles(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rulr", "suite 'rulr' does not exist: did you mean ruler"),
        ("niah_single_1,niah_singl_2", "suite 'niah_singl_2' does not exist: did you mean niah_single_"),
        ("mrcr", "its files are not part of this package"),
    ],
)
def test_unknown_suites(name, message):
    with pytest.raises(ValueError, match=message):
        build_suites(split_names(name)[0], Options())


def test_presets():
    (ruler,) = build_suites(["ultra"], Options())
    assert ruler.lengths == (131072, 524288, 1_000_000, 2097152) and not ruler.tasks
    (ruler,) = build_suites(["vt", "cwe"], Options((2048,)))
    assert ruler.tasks == ("vt", "cwe")


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch, tmp_path):
    """Runs keep their documents here; compiled kernels stay where they are."""
    monkeypatch.setattr("opensala.evaluate.document_cache.default_folder", lambda: tmp_path / "documents")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["opensala", "eval", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_commands(monkeypatch, capsys, tmp_path):
    from opensala.engine import shipped_model

    code, out, _ = run(
        monkeypatch,
        capsys,
        str(shipped_model()),
        "--suite",
        "vt",
        "--lengths",
        "1K",
        "--samples",
        "1",
        "--json",
        "--quiet",
        "-o",
        str(tmp_path / "r"),
    )
    assert code == 0 and json.loads(out)["suites"]["ruler"]["tasks"]["vt"]["1024"]["samples"] == 1
    (tmp_path / "qa_1.jsonl").write_text(
        '{"pred": "Denver", "outputs": ["Denver", "Denver, Colorado", "Mile High City"]}\n'
    )
    assert run(monkeypatch, capsys, "score", "--format", "ruler", str(tmp_path / "qa_1.jsonl"))[1] == (
        "qa_1: 100.00 (string_match_part, 1 samples, 0 empty answers)\n"
    )
    code, out, _ = run(monkeypatch, capsys, "score", str(tmp_path / "qa_1.jsonl"), "--json")
    assert json.loads(out)["qa_1"]["score"] == 100.0
    assert "score" in run(monkeypatch, capsys, "--help")[1]


def test_presets_print_the_papers_tables(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("opensala.evaluate.ruler.TASKS", {"niah_single_1": ruler_task("niah_single_1")})
    code, out, err = run(
        monkeypatch,
        capsys,
        "--suite",
        "ultra",
        "--lengths",
        "1K",
        "--samples",
        "1",
        "--quiet",
        "-o",
        str(tmp_path / "r"),
    )
    assert code == 0, err
    assert "| Qwen3-235B-A22B-Instruct-2507 (published) | 93.9 | 90.9 | 84.5 |  |" in out and re.search(
        r"\| \*\*small\S*\*\* \| \*\*\d", out
    ), out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "rulr"], "did you mean ruler"),
        (["--lengths", "4000x"], "--lengths: must be whole numbers"),
        (["--lengths", "1000"], "length must be 1,024 to 4,194,304 tokens, got 1,000"),
        (["--lengths", "4M", "--dtype", "float32", "--quiet"], "a prompt of 4,194,304 tokens needs"),
        (["--data", "mrcr"], "must be SUITE=PATH"),
        (["--data", "mrcr=nowhere"], "nowhere does not exist"),
        (["--suite", "ruler,niah_single_1"], "names ruler more than once"),
        (["--suite", "ruler,"], "suite '' does not exist"),
        (
            ["--suite", "livecodebench", "--data", "livecodebench=x"],
            "x does not exist; give a path, or hub to fetch livecodebench/code_generation_lite",
        ),
        (["--sweet", "ruler"], "No such option"),
        (["--samples", "0"], "samples"),
        (["nowhere/at/all", "--suite", "vt"], "no such checkpoint folder"),
        (["score", "nothing.jsonl"], "must be a RULER task"),
        (["score", "--format", "x", "vt.jsonl"], "--format must be ruler"),
        (["report", "nowhere"], "holds no results"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    from opensala.engine import memory

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 4 << 30)
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and not out and message in err and err.count("\n") == 1, err
    assert not any(tmp_path.rglob("samples.jsonl"))


def test_depths_cover_the_document_evenly(engine):
    suite = RulerSuite(("niah_single_1",), (1024,), samples=10)
    depths = sorted(s.depth for g in suite.groups(PromptFormat(engine.tokenizer)) for s in g.load())
    assert max(b - a for a, b in pairwise([0.0, *depths, 1.0])) < 0.25


def test_a_folder_in_use_or_full_is_one_line(engine, tmp_path):
    suite = RulerSuite(("niah_single_1",), (1024,), samples=1)
    with FolderLock(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by process .*: wait"):
        evaluate(engine, [suite], tmp_path / "run")
    with (
        small_files(200),
        pytest.raises(ValueError, match="cannot be written: File too large.*then run the same command again"),
    ):
        evaluate(engine, [suite], tmp_path / "run")
    evaluate(engine, [suite], tmp_path / "run")
    assert len(read_samples(tmp_path / "run")) == 1
