"""ingest, ask about a context, chat and contexts, as commands: streams, exit codes, one line for bad
input."""

import io
import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

from opensala.cli import main
from opensala.engine import shipped_model
from opensala.model import MiniCPMSALAForCausalLM

FILLER = "Nothing of note happened on that day, and nobody wrote anything down.\n" * 60
FACT = "The access code for blue-falcon is 48213."
QUESTION = "What is the access code for blue-falcon?"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    (tmp_path / "report.txt").write_text(f"{FILLER}{FACT}\n{FILLER}")
    (tmp_path / "more.txt").write_text("The captain of Silver Heron is Orla Brandt.\n")
    monkeypatch.chdir(tmp_path)

    def command(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["opensala", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    return command


def test_a_context_from_its_making_to_its_end(run):
    code, out, err = run("ingest", "report.txt", "-o", "a.ctx")
    assert code == 0 and out.startswith("a.ctx: ") and out.endswith(" tokens of report.txt\n")
    assert "reading" in err
    code, out, err = run("ask", "a.ctx", "-q", QUESTION, "--json", "--quiet")
    record = json.loads(out)
    assert code == 0 and err == "" and record["answer"] == "48213"
    assert 0 < record["prompt_tokens"] - record["reused_tokens"] < 40
    assert run("ingest", "report.txt", "-o", "a.ctx", "--quiet")[0] == 0  # whole already
    assert run("contexts", "fork", "a.ctx", "b.ctx") == (0, "b.ctx\n", "")
    code, out, err = run("contexts", "extend", "b.ctx", "more.txt", "--quiet")
    assert code == 0 and "report.txt, more.txt" in out and err == ""
    code, out, _ = run("ask", "b.ctx", "-q", "Who is the captain of Silver Heron?", "--quiet")
    assert (code, out) == (0, "Orla Brandt\n")
    code, out, _ = run("contexts", "list", "--json")
    assert [(c["path"], c["documents"]) for c in json.loads(out)] == [
        ("a.ctx", ["report.txt"]),
        ("b.ctx", ["report.txt", "more.txt"]),
    ]
    code, out, err = run("contexts", "verify", "b.ctx", "--quiet")
    assert code == 0 and out.endswith("bytes, as they were written\n") and err == ""
    assert run("contexts", "export", "b.ctx", "b.tar", "--quiet")[0] == 0
    assert run("contexts", "import", "b.tar", "c.ctx", "--quiet")[:2] == (0, "c.ctx\n")
    code, out, _ = run("contexts", "info", "c.ctx")
    assert code == 0 and out.startswith("c.ctx: ") and "attention and float32" in out
    code, out, _ = run("contexts", "rm", "a.ctx", "b.ctx", "c.ctx")
    assert code == 0 and out.count("bytes removed") == 3
    assert run("contexts", "list")[:2] == (0, "")


def test_a_context_is_opened_as_it_was_made(run, tmp_path):
    """In whichever dtype its keys and values are, without being told; told another one, it is refused."""
    shipped = MiniCPMSALAForCausalLM.from_pretrained(shipped_model(), dtype=torch.bfloat16)
    shipped.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(shipped_model()).save_pretrained(tmp_path / "half")
    given = ("--model", "half", "--quiet")
    for kept, option in (
        ("bfloat16", ()),
        ("int8", ("--kv-dtype=int8",)),
        ("float32", ("--kv-dtype=float32",)),
    ):
        path = f"{kept}.ctx"
        assert run("ingest", "report.txt", "-o", path, *given, *option)[0] == 0
        assert run("ingest", "report.txt", "-o", path, *given)[0] == 0  # whole already
        code, out, _ = run("ask", path, "-q", QUESTION, "--json", *given)
        assert code == 0 and json.loads(out)["kv_dtype"] == kept and json.loads(out)["answer"] == "48213"
        assert run("chat", path, *given, stdin=QUESTION)[:2] == (0, "48213\n")
        assert run("contexts", "extend", path, "more.txt", *given)[0] == 0
        other = "bfloat16" if kept == "int8" else "int8"
        code, out, err = run("ask", path, "-q", QUESTION, *given, "--kv-dtype", other)
        assert (code, out) == (2, "")
        assert f"keys and values are kept in kv_dtype {kept} in the context and {other} here" in err
        assert f"and float32, keys and values in {kept}," in run("contexts", "info", path)[1]


def test_a_conversation(run):
    assert run("ingest", "report.txt", "-o", "a.ctx", "--quiet")[0] == 0
    said = [QUESTION, "", "/docs", "/save", QUESTION, "/undo", "/undo 2", "/fork", "/fork b.ctx", "/undo x"]
    code, out, err = run("chat", "a.ctx", stdin="\n".join([*said, "/nothing", "/help", ""]))
    assert (code, out) == (0, "48213\n48213\n")
    for words in (
        "first token after",
        "report.txt: 8,",
        "saved to a.ctx",
        "1 question with answer left",
        "turns to undo must be 1 to 1, got 2",
        "/fork needs the name of a new context",
        "forked to b.ctx",
        "/undo takes a number",
        "/nothing is no command",
        "/quit ",
    ):
        assert words in err, words
    for path in ("a.ctx", "b.ctx"):
        code, out, _ = run("contexts", "info", path, "--json")
        assert json.loads(out)["turns"] == [{"question": QUESTION, "answer": "48213"}]
    code, out, err = run("chat", "b.ctx", "--quiet", stdin=f"{QUESTION}\n/quit\n{QUESTION}\n")
    assert (code, out, err) == (0, "48213\n", "")
    code, out, err = run("chat", "--max-new-tokens", "4", stdin=f"{FACT} {QUESTION}\n/save c.ctx\n/save\n")
    assert code == 0 and err.count("saved to c.ctx") == 2
    code, out, err = run("chat", "b.ctx", "--host-memory", "40MB", stdin=f"{QUESTION}\n")
    assert code == 0 and out == "48213\n" and "bytes read from disk, where the context has" in err
    said = run("chat", "b.ctx", "--host-memory", "1MB", stdin=f"{QUESTION}\n")
    assert said[:2] == (2, "") and "one step needs 64 pages of 32,768 bytes at a time, and" in said[2]
    assert run("ingest", "report.txt", "-o", "d.ctx", "--host-memory", "3MB", "--quiet")[0] == 0
    assert run("contexts", "extend", "d.ctx", "more.txt", "--host-memory", "3MB", "--quiet")[0] == 0
    code, out, _ = run("ask", "d.ctx", "-q", QUESTION, "--host-memory", "3MB", "--quiet")
    assert (code, out) == (0, "48213\n")
    code, _, err = run("ingest", "report.txt", "-o", "e.ctx", "--host-memory", "few")
    assert code == 2 and "--host-memory: must be a size like" in err
    code, _, err = run("chat", stdin="/save\nhello\n")
    assert code == 0 and "the context has no folder yet" in err and "1 question with answer not saved" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "a.ctx", "-q", "x"], "a.ctx: there is no such context"),
        (["ask", "a.ctx", "report.txt", "-q", "x"], "is a context, which is asked alone"),
        (["ask", "file.ctx", "-q", "x"], "file.ctx: a file, no context"),
        (["ask", "empty.ctx", "-q", "x"], "empty.ctx: no context: it has no manifest.json"),
        (["chat", "nowhere"], "nowhere: there is no such context"),
        (["ingest", "report.txt"], "Missing option"),
        (["ingest", "report.txt", "-o", ""], "--output is empty"),
        (["ingest", "report.txt", "-o", "file.ctx"], "file.ctx is a file: give a folder"),
        (["ingest", "report.txt", "-o", "full"], "full is not empty"),
        (["ingest", "nowhere.txt", "-o", "b.ctx"], "nowhere.txt: no such file"),
        (["contexts", "info", "full"], "full: no context"),
        (["contexts", "list", "nowhere"], "nowhere: no such folder"),
        (["contexts", "verify", "nowhere"], "nowhere: there is no such context"),
        (["contexts", "fork", "nowhere", "b.ctx"], "nowhere: there is no such context"),
        (["contexts", "export", "nowhere", "b.tar"], "nowhere: there is no such context"),
        (["contexts", "import", "nowhere", "b.ctx"], "nowhere: no such file"),
        (["contexts", "import", "report.txt", "b.ctx"], "report.txt"),
        (["contexts", "rm", "full"], "full: no context"),
        (["contexts", "extend", "nowhere", "report.txt"], "nowhere: there is no such context"),
        (["contexts", "frob"], "No such command"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, words):
    (tmp_path / "file.ctx").write_text("x")
    (tmp_path / "empty.ctx").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert (
        (code, out, len(lines)) == (2, "", 1) and lines[0].startswith("opensala: ") and words in lines[0]
    ), err
    assert not (tmp_path / "b.ctx").exists() and (tmp_path / "full" / "mine.txt").exists()


def test_what_was_asked_before_is_not_read_again(run, tmp_path):
    folder = ("--prefix-dir", "kept", "--prefix-limit", "200MB")
    code, out, err = run("ask", "report.txt", "-q", QUESTION, *folder)
    assert (code, out) == (0, "48213\n") and "in an earlier run" not in err
    code, out, _ = run("ask", "report.txt", "-q", "Who is the captain?", *folder, "--json", "--quiet")
    record = json.loads(out)
    assert code == 0 and 0 < record["prompt_tokens"] - record["restored_tokens"] < 40
    assert record["restored_tokens"] == record["reused_tokens"]
    code, out, err = run("ask", "report.txt", "-q", QUESTION, *folder)
    assert (code, out) == (0, "48213\n") and "of them in an earlier run)" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "more.txt", "report.txt"]
    for words, said in (
        (("--prefix-dir", "kept", "--prefix-limit", "some"), "--prefix-limit: must be a size like"),
        (("--prefix-dir", "report.txt"), "report.txt is a file"),
    ):
        code, out, err = run("ask", "report.txt", "-q", QUESTION, "--quiet", *words)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1
    assert run("ingest", "report.txt", "-o", "a.ctx", "--quiet")[0] == 0
    code, _, err = run("ask", "a.ctx", "-q", QUESTION, *folder)
    assert code == 2 and "not for a context" in err
