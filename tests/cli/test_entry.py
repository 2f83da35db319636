"""The command as a program: its streams, its exit codes, and nothing of other packages on stderr."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys

import pytest

from opensala.cli.entry import _Notes

from ..pdfs import encrypted, make_pdf

FILLER = "Nothing of note happened on that day, and nobody wrote anything down.\n" * 40
FACT = "The access code for blue-falcon is 48213."
QUESTION = "What is the access code for blue-falcon?"
COMMAND = [sys.executable, "-m", "opensala"]
ONE_LINE = re.compile(r"opensala: [^\n]*\n")
BAR = r"reading [^\n]* \d[\d,]*/\d[\d,]* [^\n]*\n"
COST = (
    r"[\d,]+ tokens read, first token after \d+\.\d\d s \([\d,]+ tokens/s\)(, then [\d,.]+ tokens/s)?; "
    r"cache [\d.,]+ MiB, peak memory [\d,]+ MiB\n"
)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text(f"{FILLER}{FACT}\n{FILLER}")
    return str(path)


def run(*arguments, shell="", timeout=200, **options):
    """The command in a process of its own, in a shell with redirections if there are any."""
    command = [*COMMAND, *arguments]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(command, timeout=timeout, **{**streams, **options})
    assert b"Traceback" not in (done.stderr or b""), done.stderr
    return done


@pytest.mark.parametrize(
    ("what", "quiet"), [("ask", False), ("ask pdf", False), ("ask pdf", True), ("generate", False)]
)
def test_stderr_holds_what_we_print_and_nothing_else(document, tmp_path, what, quiet):
    (tmp_path / "a.pdf").write_bytes(make_pdf([[FACT], []]).replace(b"startxref\n", b"startxref\n9"))
    source = str(tmp_path / "a.pdf") if what == "ask pdf" else document
    arguments = ["generate", "import os"] if what == "generate" else ["ask", source, "-q", QUESTION]
    done = run(*arguments, "--max-new-tokens", "8", *(["--quiet"] if quiet else []))
    assert done.returncode == 0 and done.stdout.strip()
    notes = r"(note: [^\n]*a\.pdf: [^\n]*\n){2}" if what == "ask pdf" else ""
    expected = "" if quiet else rf"{notes}((note: [^\n]*(layers|dtype auto)[^\n]*\n)|{BAR})+{COST}"
    assert re.fullmatch(expected, done.stderr.decode()), done.stderr.decode()


def test_demo_says_nothing_of_other_packages(tmp_path):
    nothing_pulled = os.environ | {"OPENSALA_HOME": str(tmp_path)}
    done = run("demo", "--tokens", "2048", "--seed", "1", env=nothing_pulled)
    lines = done.stderr.decode().splitlines()
    assert lines, "it says what it reads"
    ours = r"[\d,]+ tokens of .*|.*'.*|.*\(seed|\d*\)|model: .*|note: .*|.*reads.*|"
    assert done.returncode == 0 and all(re.fullmatch(ours, line) for line in lines), lines


LIBRARIES = """
import logging, sys, warnings
import opensala
from opensala.cli import commands, main

def speak(*arguments, **options):
    warnings.warn("from a library")
    warnings.warn("from a library", DeprecationWarning)
    for name in ("transformers.x", "huggingface_hub.y", "torch.z", "pypdf", "anything.else"):
        logging.getLogger(name).warning("from a library")
        logging.getLogger(name).error("from a library")
    logging.getLogger("opensala").warning("from ourselves")
    raise ValueError("stop here")

import opensala.engine
opensala.engine.read_documents = speak
sys.argv = ["opensala", "ask", "x", "-q", "x"]
main()
"""


def test_warnings_of_libraries_are_not_shown_and_ours_are():
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "note: from ourselves\nopensala: stop here\n"


def test_a_defect_is_shown_with_its_traceback(capsys):
    """What a server says of a request that failed: `the server's log says how`."""
    handler = _Notes()
    try:
        raise KeyError("here")
    except KeyError:
        handler.emit(logging.LogRecord("opensala", 40, "", 0, "a request failed", (), sys.exc_info()))
    said = capsys.readouterr().err
    assert said.startswith("note: a request failed\nTraceback") and "KeyError: 'here'" in said


@pytest.mark.parametrize(
    ("command", "shell", "message"),
    [
        ("ask", ">/dev/full", "(No space left on device)"),
        ("generate", ">/dev/full", "(No space left on device)"),
        ("generate", ">&-", "standard output is closed"),
        ("--help", ">/dev/full", "(No space left on device)"),
    ],
)
def test_output_that_is_lost_is_no_success(document, command, shell, message):
    arguments = {
        "ask": ["ask", document, "-q", QUESTION, "--quiet"],
        "generate": ["generate", "x", "--quiet"],
    }
    done = run(*arguments.get(command, [command]), shell=shell)
    assert done.returncode == 1 and ONE_LINE.fullmatch(done.stderr.decode()), done.stderr.decode()
    assert message in done.stderr.decode()


def test_stderr_closed_or_full_leaves_the_answer_alone(document):
    assert run("ask", document, "-q", QUESTION, shell="2>&-").stdout == b"48213\n"
    done = run("ask", document, "-q", QUESTION, "--quiet", shell="2>/dev/full")
    assert (done.returncode, done.stdout) == (0, b"48213\n")


def test_closed_stdin():
    done = run("ask", "-", "-q", "x", shell="<&-")
    assert done.returncode == 2 and done.stderr == b"opensala: standard input: it is closed\n"


def test_a_reader_that_goes_away(document):
    done = run("ask", document, "-q", QUESTION, "--quiet", shell="| true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (1, 141) and done.stderr == b""


def test_questions_and_prompts_that_are_not_utf8(document):
    for arguments in ([b"ask", document, b"-q", b"caf\xe9?"], [b"generate", b"caf\xe9?"]):
        done = run(*arguments)
        assert done.returncode == 2 and ONE_LINE.fullmatch(done.stderr.decode())
        assert b"is not valid UTF-8 (character 4)" in done.stderr


def test_file_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "docs")
    os.mkdir(folder)
    for name, text in ((b"caf\xe9.txt", FACT), (b"two\nlines.txt", FILLER), (b"\xff.bin", "\0")):
        with open(folder + b"/" + name, "w") as file:
            file.write(text)
    done = run("ask", folder, "-q", QUESTION, "--json", "--quiet")
    record = json.loads(done.stdout)
    assert (done.returncode, record["answer"], done.stderr) == (0, "48213", b"")
    assert [s["reason"][:25] for s in record["skipped"]] == ["looks like a binary file "]
    missing = run("ask", folder + b"/gon\xe9.txt", "-q", "x")
    assert missing.returncode == 2 and b"no such file" in missing.stderr


def test_what_a_folder_holds_beside_text_is_listed(tmp_path):
    (tmp_path / "a.txt").write_text(FACT)
    for number in range(8):
        (tmp_path / f"b{number}.bin").write_bytes(b"\0")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    err = run("ask", tmp_path, "-q", QUESTION).stderr.decode()
    assert err.count("note: skipped ") == 5 and "note: and 4 more skipped (--json lists them all)\n" in err
    assert f"note: skipped {tmp_path}/b0.bin: looks like a binary file" in err
    skipped = json.loads(run("ask", tmp_path, "-q", QUESTION, "--json", "--quiet").stdout)["skipped"]
    assert len(skipped) == 9 and skipped[-1]["name"] == f"{tmp_path}/latin.txt"
    assert skipped[-1]["reason"].startswith("not UTF-8 text")


def test_an_empty_path_is_refused(document, tmp_path):
    done = run("ask", "", "-q", QUESTION, cwd=tmp_path)
    assert done.returncode == 2 and b"a document's name is empty" in done.stderr


@pytest.mark.parametrize(
    ("way", "kind"),
    [("/dev/stdin", "text"), ("<(cat)", "text"), ("<(cat)", "pdf"), ("-", "locked pdf after a header")],
)
def test_pipes(tmp_path, way, kind):
    data = make_pdf([[FACT]])
    data = {
        "text": f"{FILLER}{FACT}\n".encode(),
        "pdf": data,
        "locked pdf after a header": b"\nX-Note: 1\n\n" + encrypted(data, "", "owner"),
    }[kind]
    inner = " ".join(f"'{word}'" for word in COMMAND)
    script = f"cat | {inner} ask {way} -q '{QUESTION}' --quiet"
    if way == "<(cat)":
        script = f"{inner} ask <(cat '{tmp_path}/data') -q '{QUESTION}' --quiet"
        (tmp_path / "data").write_bytes(data)
    done = subprocess.run(["bash", "-c", script], input=data, capture_output=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"48213\n", b"")


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_a_group_alone_prints_its_help(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) > 5 and any(line.startswith("Usage:") for line in lines) and "Commands:" in lines


@pytest.mark.parametrize("during", ["starting", "transformers"])
def test_ctrl_c_during_import(during):
    """What is imported is read from Python's own report on imports; the signal comes right after `during`."""
    command = [sys.executable, "-X", "importtime", "-m", "opensala", "ask", "-", "-q", "x"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wanted = {"starting": b"opensala.starting", "transformers": b"transformers.utils.logging"}[during]
    assert process.stderr is not None
    while wanted not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines() if not line.startswith(b"import time:")]
    assert (process.returncode, out, said) == (130, b"", [b"opensala: interrupted"])


def test_a_program_that_imports_the_package_keeps_its_ctrl_c():
    code = (
        "import signal; before = signal.getsignal(2); import opensala; print(signal.getsignal(2) is before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n"


def test_streams_without_descriptors(monkeypatch, document):
    """As in notebooks: the command runs in process, stdout is an object of theirs."""
    from opensala.cli import main

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["opensala", "--version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and out.getvalue()[0].isdigit()
