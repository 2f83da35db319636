"""Every command, Python example and link in README and docs works."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from opensala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.cli import main
from opensala.engine import shipped_model

from .convert.test_transfer import make_teacher
from .lm_eval_tasks import answer_task
from .model.test_sglang import FITS
from .serving import serving

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
HUB_NAME = "openbmb/MiniCPM-SALA"
SERVER = "http://localhost:8000"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{n}")
    for page in PAGES
    for n, code in enumerate(blocks(page, "python"))
]

FACTS_TASK = answer_task("facts", "facts.jsonl", "answer", 8)


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """The files that the documentation's commands speak of."""
    report = " report " in str(
        getattr(request.node, "callspec", None) and request.node.callspec.params.get("command", "")
    )
    filler = "Nothing of note happened that day.\n" * 30
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "settings.py").write_text(
        f'"""Settings."""\n{"# filler" * 20}\nMAX_RETRY_COUNT = 512\n'
    )
    (tmp_path / "report.txt").write_text(f"{filler}The access code for the north gate is 48213.\n{filler}")
    (tmp_path / "notes.md").write_text(f"# Notes\n\n{filler}")
    (tmp_path / "server.log").write_text(f"{filler}The serial number of unit Velmora is 90417.\n{filler}")
    scores = {
        "recall": [0.5 + 0.01 * (7 * i % 36) for i in range(36)],
        "general": [0.6 + 0.005 * (5 * i % 36) for i in range(36)],
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "qa_1.jsonl").write_text(
        json.dumps({"pred": "Denver", "outputs": ["Denver", "Denver, Colorado"]}) + "\n"
    )
    results = tmp_path / "results"
    rows = [
        {
            "id": f"{task}/{length}/{n}",
            "suite": "ruler",
            "task": task,
            "length": length,
            "depth": n / 9,
            "prompt_tokens": length,
            "read_tokens": length,
            "prediction": "",
            "references": ["x"],
            "score": n / 9,
        }
        for task in ("vt", "qa_1")
        for length in (4096, 16384)
        for n in range(10)
    ]
    if report:
        results.mkdir()
        (results / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (results / "run.json").write_text(
            json.dumps({"identity": {}, "suites": {}, "runs": [{"name": "some/model"}]})
        )
    (tmp_path / "my_tasks").mkdir()
    question = {
        "text": "The access code for old-mill is 902.",
        "question": "What is the access code for old-mill?",
        "answer": "902",
    }
    (tmp_path / "my_tasks" / "facts.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "my_tasks" / "facts.yaml").write_text(
        FACTS_TASK.replace("FOLDER", str(tmp_path / "my_tasks"))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opensala.evaluate.document_cache.default_folder", lambda: tmp_path / "documents")
    return tmp_path


def planned(words, folder):
    """A conversion as documented takes hours: the plan for it is made, with a tiny teacher in place of the
    one named."""
    if words[2] == "select":
        return words
    if words[2] == "plan":  # a configuration is all it reads
        (folder / "teacher").mkdir()
        shutil.copy(ROOT / "tests" / "convert" / "qwen3_8b.json", folder / "teacher" / "config.json")
        return [*words[:3], str(folder / "teacher"), *words[4:]]
    if words[2] == "pack":  # the documented number of tokens would fill a disk
        for data in words[4 : words.index("-o")]:
            path = data.partition("=")[0]
            file = folder / path / "a.jsonl" if path.endswith("/") else folder / path
            file.parent.mkdir(exist_ok=True)
            rows = (json.dumps({"text": f"{path} {n}: nothing of note happened."}) for n in range(100))
            file.write_text("\n".join(rows))
        limit = [*words[4:-1], "2000"] if "--tokens" in words else words[4:]
        return [*words[:3], str(shipped_model()), *limit]
    make_teacher(folder / "teacher", vocab_size=2048, num_hidden_layers=8)
    AutoTokenizer.from_pretrained(shipped_model()).save_pretrained(folder / "teacher")
    small = ["--align-batch", "1", "--distill-batch", "1", "--probe-sequences", "2", "--data", "src"]
    (folder / "src" / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 2000)
    return [
        *words[:2],
        str(folder / "teacher"),
        *words[3:],
        *small,
        *([] if "--plan" in words else ["--plan"]),
    ]


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """A context, and a file that it was exported to, as the documentation's commands find them."""
    from opensala.contexts import Context
    from opensala.contexts.store import export
    from opensala.engine import Document, load_engine

    folder = tmp_path_factory.mktemp("contexts")
    filler = "Nothing of note happened that day.\n" * 30
    text = f"{filler}The access code for the north gate is 48213.\n{filler}"
    Context.ingest(load_engine(), [Document("report.txt", text)], folder / "book.ctx").close()
    export(folder / "book.ctx", folder / "book.tar")
    return folder


ANSWERS = {"report.txt": "48213", "ask book.ctx": "48213", "src/": "512", "server.log": "90417"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, monkeypatch, capsys, request):
    words = shlex.split(command)
    if words[:2] == ["opensala", "serve"]:
        pytest.importorskip("fastapi", reason="the extra serve is not installed")
        make_keys(folder, words)
        if words[2:3] != ["keys"]:
            with serving(words[2:]):
                return
    if {"book.ctx", "book.tar"} & {*words} and words[1] != "ingest":
        made = request.getfixturevalue("book")
        shutil.copytree(made / "book.ctx", folder / "book.ctx")
        if "import" in words:
            shutil.copy(made / "book.tar", folder)
        monkeypatch.setattr(sys, "stdin", io.StringIO("/docs\n/quit\n"))  # of a conversation
    if words[1:2] == ["check"]:
        MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**FITS)).save_pretrained(folder / words[2])
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    if (
        words[0] == "python"
    ):  # training the small model takes an hour: the script is there and takes these options
        subprocess.run([sys.executable, ROOT / words[1], "--help"], check=True, capture_output=True)
        return
    if words[0] == "cat":
        done = subprocess.run(
            command.replace("opensala", f"{sys.executable} -m opensala"),
            shell=True,
            capture_output=True,
            text=True,
            check=True,
        )
        out = done.stdout
    else:
        assert words[0] == "opensala", f"no test knows how to run {command!r}"
        if (
            words[1] == "bench" and "--quick" not in words
        ):  # minutes: the command is there and takes these options
            words.append("--help")
        words = planned(words, folder) if words[1] == "convert" else words
        if words[1] == "quantize":  # minutes of calibration and questions
            words += ["--sequences", "2", "--length", "256", "--questions", "1", "--document-tokens", "512"]
        if words[1] == "train" and words[2] != "plan":  # minutes: its options are read and its stages listed
            words.append("--plan")
        if words[1] == "eval" and "--suite" in words and "1024" not in words:  # likewise
            words.append("--help")
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr().out
        assert stopped.value.code == 0
    for source, answer in ANSWERS.items():
        if source in command and words[1] != "ingest":
            assert answer in out


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_example(code, folder):
    """Run as written; the released model's name stands for the shipped model's folder, for want of a
    network."""
    if "import lm_eval" in code:  # the environments of the oldest and newest dependencies are without it
        pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    code = code.replace(f'"{HUB_NAME}"', repr(str(shipped_model()))).replace(', device_map="auto"', "")
    code = code.replace("torch.bfloat16", "torch.float32")
    with served(code) as code:
        run_example(code)


@contextlib.contextmanager
def served(code):
    """With a server, if the example speaks to one."""
    if SERVER not in code:
        yield code
        return
    for name in ("fastapi", "openai", "anthropic"):
        pytest.importorskip(name, reason="the extra serve, or a client for it, is not installed")
    with serving(["--max-cached-tokens", "40000", "--contexts", "kept"]) as url:
        yield code.replace(SERVER, url)


def make_keys(folder, words):
    """The key file that a command speaks of."""
    from opensala.server import new_key

    if "--keys" in words or "revoke" in words or "list" in words:
        new_key(folder / "keys.json", "ada")


def run_example(code):
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=offline
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_python_page_prints_the_right_answers(folder):
    done = subprocess.run(
        [sys.executable, "-c", blocks(ROOT / "docs" / "python.md", "python")[0]],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[::2] == ["48213", "Marla Quist"]


def test_the_table_of_phrasings_works(folder):
    """Each row of the README's table: the fact in a short document, the question, the right answer."""
    from opensala.engine import Document, SamplingParams, ask, load_engine

    rows = re.findall(r"^\| (.+?) \| ((?:What|Who) .+?) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 6
    engine, filler = load_engine(), "Nothing of note happened that day.\n" * 40
    for fact, question in rows:
        fact = re.sub(r" \(also .*", "", fact)
        expected = re.search(r"(\$1,250|\d{3,}|Orla Brandt)\.?$", fact).group(1)
        result = ask(
            engine,
            [Document("d", f"{filler}{fact}\n{filler}")],
            question,
            SamplingParams(max_tokens=24),
            quiet=True,
        )
        assert result.text == expected, (fact, question, result.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_names_every_command():
    from opensala.cli import app

    names = {c.name or c.callback.__name__ for c in app.registered_commands} | {
        group.name for group in app.registered_groups
    }
    assert names == set(re.findall(r"^\| `opensala (\w+)", (ROOT / "README.md").read_text(), re.M))
