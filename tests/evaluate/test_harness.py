"""lm-eval's tasks through the command line: whole runs offline, killed and resumed; what cannot be had is
named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from opensala.cli import main  # noqa: E402 -- after the check
from opensala.engine import load_engine  # noqa: E402
from opensala.evaluate.code_eval import CodeEval, pass_at, passes_tests, sandboxed_code_eval  # noqa: E402
from opensala.evaluate.harness import load_tasks, read_figures  # noqa: E402
from opensala.evaluate.report import write_report  # noqa: E402
from opensala.evaluate.requests import RequestLog, ResumingLM  # noqa: E402
from opensala.evaluate.sandbox import Limits  # noqa: E402
from tests.lm_eval_tasks import answer_task, choice_task, head  # noqa: E402

CHOICE = choice_task("own_choice", "questions.jsonl")
OPEN = answer_task("own_answer", "questions.jsonl", "choices[label]", 8)
GROUP = "group: own_group\ntask: [own_choice, own_answer]\n"
CODE = (
    head("own_code", "questions.jsonl")
    + """unsafe_code: true
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "assert result == 3"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: !function scorer.pass_at_1, aggregation: mean, higher_is_better: true}]
"""
)
SCORER = """
import evaluate
scorer = evaluate.load("code_eval")

def pass_at_1(references, predictions):
    return scorer.compute(references=references, predictions=[["result = 1 + 2"]], k=[1])[0]["pass@1"]
"""
NAMES = [
    f"{colour}-{thing}"
    for colour in ("blue", "red", "old", "tall")
    for thing in ("falcon", "oak", "mill", "ship")
]


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "text": f"Nothing of note happened. {'The day went by. ' * 8}The access code for {name} is "
            f"{48213 + 911 * n}.",
            "question": f"What is the access code for {name}?",
            "choices": ["11111", str(48213 + 911 * n), "99999"],
            "label": 1,
        }
        for n, name in enumerate(NAMES)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (
        ("choice.yaml", CHOICE),
        ("answer.yaml", OPEN),
        ("group.yaml", GROUP),
        ("code.yaml", CODE),
        ("scorer.py", SCORER),
    ):
        (folder / name).write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["opensala", "eval", "--quiet", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_a_run_beside_a_suite_of_ours(monkeypatch, capsys, tmp_path, tasks):
    """A group of lm-eval and a RULER task into one folder, then more of them, then the report."""
    folder = tmp_path / "r"
    common = ["--include-path", str(tasks), "-o", str(folder), "--lengths", "1K", "--no-cache"]
    code, out, err = run(monkeypatch, capsys, "--suite", "own_group,niah_single_1", "--samples", "2", *common)
    assert code == 0, err
    assert "| own_choice | acc | 1.0000 |" in out and "| niah_single_1 |" in out
    figures = read_figures(folder)
    assert figures["n-samples"]["own_answer"]["effective"] == 2 and figures["config"]["torch_seed"] == 1234
    header = json.loads((folder / "run.json").read_text())
    assert {"ruler", "lm-eval: own_group"} <= set(header["suites"]) and header["identity"]["tokenizer"]
    before = (folder / "requests.jsonl").read_text()
    assert len(before.splitlines()) == 2 * 3 + 2
    code, out, err = run(monkeypatch, capsys, "--suite", "own_answer", "--samples", "3", "--json", *common)
    assert code == 0 and json.loads(out)["lm_eval"]["own_choice"]["acc,none"] == 1.0, (
        err
    )  # what the folder holds stays
    assert (folder / "requests.jsonl").read_text().startswith(before)
    assert len((folder / "requests.jsonl").read_text().splitlines()) == 9  # one answer more
    rows = [json.loads(line) for line in (folder / "lm_eval_samples.jsonl").read_text().splitlines()]
    assert sorted(r["id"] for r in rows) == [
        "own_answer/0",
        "own_answer/1",
        "own_answer/2",
        "own_choice/0",
        "own_choice/1",
    ]
    assert all(r["prompt_hash"] and r["doc_hash"] for r in rows)
    report = write_report([folder], tmp_path / "report").read_text()
    assert "| own_choice | acc | 1.0000 |" in report and "`r/lm_eval_samples.jsonl`" in report


def test_kill_loses_at_most_one_sample(monkeypatch, capsys, tmp_path, tasks):
    """kill -9 in the middle of the answers; the rerun asks for the rest, and ends with the figures of a run
    nobody disturbed."""
    command = [
        sys.executable,
        "-m",
        "opensala",
        "eval",
        "--suite",
        "own_answer,own_choice",
        "--include-path",
        str(tasks),
        "--quiet",
        "-o",
    ]
    log = tmp_path / "killed" / "requests.jsonl"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}

    def lines():
        return log.read_bytes().count(b"\n") if log.exists() else 0

    process = subprocess.Popen(
        [*command, str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    deadline = time.monotonic() + 240
    while lines() < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = log.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 5 <= kept.count(b"\n") < 64  # 16 answers and 48 likelihoods in all
    for folder in ("killed", "whole"):
        code, out, err = run(monkeypatch, capsys, *command[4:-2], "-o", str(tmp_path / folder))
        assert code == 0 and "own_choice" in out, err
    assert log.read_bytes().startswith(kept) and lines() == 64  # nothing was asked twice
    assert read_figures(tmp_path / "killed")["results"] == read_figures(tmp_path / "whole")["results"]
    assert sorted(log.read_text().splitlines()) == sorted(
        (tmp_path / "whole" / "requests.jsonl").read_text().splitlines()
    )


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def test_answers_are_taken_from_the_log(tmp_path, monkeypatch):
    """Equal requests (a task that asks several times) have answers of their own; the rest is asked in its
    order."""
    lm = ResumingLM(load_engine(), log=str(tmp_path / "log.jsonl"))
    options = {"until": ["\n"], "max_gen_toks": 3}
    first = lm.generate_until(
        requests(("import", options), ("import", options), ("def f(", options)), disable_tqdm=True
    )
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(rows) == 3 and first[0] == first[1]
    changed = [json.loads(row) for row in rows]
    for n, row in enumerate(changed):
        row["answer"] = f"held {n}"
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in changed) + '{"request": "torn'
    )
    lm = ResumingLM(lm.engine, log=tmp_path / "log.jsonl")
    again = lm.generate_until(
        requests(
            ("def f(", options),
            ("import", options),
            ("class", options),
            ("import", options),
            ("import", options),
        ),
        disable_tqdm=True,
    )
    held = {row["answer"] for row in changed}
    assert set(again[:2]) | {again[3]} == held and again[4] == first[0] and again[2] not in held
    assert len(RequestLog(tmp_path / "log.jsonl")) == 5
    score = lm.loglikelihood(requests(("import", " os")), disable_tqdm=True)
    assert (
        ResumingLM(lm.engine, log=tmp_path / "log.jsonl").loglikelihood(
            requests(("import", " os")), disable_tqdm=True
        )
        == score
    )
    lines = len((tmp_path / "log.jsonl").read_text().splitlines())
    ResumingLM(lm.engine, log=tmp_path / "log.jsonl", max_length=64).loglikelihood(
        requests(("import", " os")), disable_tqdm=True
    )
    assert (
        len((tmp_path / "log.jsonl").read_text().splitlines()) == lines + 1
    )  # that might be another answer: asked again
    assert ResumingLM(lm.engine).loglikelihood(requests(("import", " os")), disable_tqdm=True) == score
    (tmp_path / "log.jsonl").write_text('{"request": "x"}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: field 'answer' is missing"):
        RequestLog(tmp_path / "log.jsonl")


def test_code_runs_only_with_leave(monkeypatch, capsys, tasks, tmp_path):
    with pytest.raises(
        ValueError,
        match="own_code: runs programs that the model writes; allow it with --allow-code-execution",
    ):
        load_tasks(["own_code"], tasks)
    code, out, err = run(
        monkeypatch,
        capsys,
        "--suite",
        "own_code",
        "--include-path",
        str(tasks),
        "--samples",
        "1",
        "--allow-code-execution",
        "-o",
        str(tmp_path / "r"),
    )
    assert code == 0 and "| own_code | pass_at_1 | 1.0000 |" in out, err
    code, _, err = run(monkeypatch, capsys, "--suite", "humaneval")
    assert code == 2 and "allow it with --allow-code-execution" in err


def test_humaneval_and_mbpp_of_lm_eval(tmp_path):
    """lm-eval's own files with a problem of ours: the right program passes, in the sandbox, without
    network."""
    import lm_eval.tasks

    there = Path(lm_eval.tasks.__file__).parent
    problem = {
        "task_id": "1",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "test": "def check(f):\n    assert f(1, 2) == 3\n",
        "text": "Add.",
        "code": "",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 2) == 2", "assert add(1, 1) == 2"],
    }
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    for name in ("humaneval", "mbpp"):
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {there}/{name}/{name}.yaml\ntask: own_{name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/problems.jsonl}}}}\n"
        )
    human, mbpp = load_tasks(["own_humaneval", "own_mbpp"], tmp_path, allow_code=True).tasks
    for task, program in (
        (human, "def add(a, b):\n    return a + b\n"),
        (mbpp, "def add(a, b): return a + b"),
    ):
        doc = next(iter(task.test_docs()))
        for code, right in ((program, 1.0), (program.replace("+", "-"), 0.0)):
            (figure,) = task.process_results(doc, [[code]] if task is human else [code]).values()
            assert figure == right or figure == {"pass@1": right}, (task, code, figure)


def test_code_eval():
    """The figures of the hub's scorer, from the sandbox."""
    right, wrong, early = "def f(x):\n    return x + 1", "def f(x):\n    return x", "import os\nos._exit(0)"
    figures, results = CodeEval().compute(
        predictions=[[right, wrong, early], [wrong, wrong, wrong]],
        references=["assert f(1) == 2"] * 2,
        k=[1, 2, 5],
    )
    assert figures == pytest.approx({"pass@1": 1 / 6, "pass@2": (2 / 3) / 2})
    assert [row["passed"] for _, row in results[0]] == [True, False, False]
    assert not passes_tests("import sys\nsys.exit(0)", "", Limits()) and passes_tests(
        "print('x', end='')", "", Limits()
    )
    assert (pass_at(5, 0, 2), pass_at(5, 5, 2), pass_at(4, 2, 1)) == (0.0, 1.0, 0.5)
    import evaluate

    load = evaluate.load
    with sandboxed_code_eval():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
    assert evaluate.load is load


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--suite", "own_choise"],
            "suite 'own_choise' does not exist, here or in lm-eval: did you mean own_choice",
        ),
        (
            ["--suite", "mmlu_pro,own_choice"],
            "1 of 2 tasks could not be loaded: mmlu_pro: Couldn't reach 'TIGER-Lab/MMLU-Pro' on the Hub",
        ),
        (["--suite", "mmlu_pro,own_choice"], "or choose --suite own_choice"),
        (
            ["--suite", "standard"],
            "runs programs that the model writes; allow it with --allow-code-execution",
        ),
        (["--suite", "standard", "--allow-code-execution"], "--data livecodebench=hub"),
        (
            ["--suite", "own_choice", "--strip-thinking"],
            "--strip-thinking: lm-eval's tasks (own_choice) score answers as they are",
        ),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tasks, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "own_choise" in arguments:  # reading lm-eval's 14,000 task files takes long: only ours here
        from lm_eval.tasks import TaskManager

        monkeypatch.setattr(
            "lm_eval.tasks.TaskManager",
            lambda include_path, include_defaults=True: TaskManager(
                include_path=include_path, include_defaults=False
            ),
        )
    if "mmlu_pro,own_choice" in arguments:
        import lm_eval.tasks

        there = Path(lm_eval.tasks.__file__).parent / "mmlu_pro"
        manager = lm_eval.tasks.TaskManager
        monkeypatch.setattr(
            "lm_eval.tasks.TaskManager",
            lambda include_path, include_defaults=True: manager(
                include_path=[include_path, there], include_defaults=False
            ),
        )
    code, out, err = run(monkeypatch, capsys, *arguments, "--include-path", str(tasks))
    assert code == 2 and not out and message in err and err.count("\n") == 1, err


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(
        ValueError,
        match=r"hellaswag: not a suite of this package \(ruler\), and lm-eval, which may have it, is not "
        r"installed: pip install",
    ):
        load_tasks(["hellaswag"], known=["ruler"])
