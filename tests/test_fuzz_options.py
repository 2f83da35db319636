"""Bad values of options: one line that says what is wrong and exit code 2, before any work."""

import sys

import pytest

from opensala.cli import main

NOT_INTEGERS = ["", " ", "x", "1.5", "1e3", "nan", "inf", "0x10", "--"]
NOT_NUMBERS = ["", "x", "1,5", "--"]
HUGE = "9" * 30
SHARED = {
    "--max-new-tokens": [*NOT_INTEGERS, "0", "-1", HUGE],
    "--temperature": [*NOT_NUMBERS, "-1", "nan", "inf", "-inf", "1e999", "1e-300", "1e30"],
    "--top-p": [*NOT_NUMBERS, "0", "-1", "1.01", "nan", "inf"],
    "--seed": [*NOT_INTEGERS, "-1", HUGE],
    "--dtype": ["", "int8", "float64", "FLOAT32"],
    "--device": ["", "tpu", "meta", "cpu:x"],
    "--attention-mode": ["", "sprse", "Dense"],
    "--block-search": ["", "x"],
    "--model": ["", " ", "/nowhere", "./nowhere", "a/b/c", "/dev/null", "~"],
    "--nothing": ["x"],
}
EVAL = {
    "--lengths": [",,", "x", "-1", "0", "1e3", "K", "1KK", "4K,,8K", "512", "9" * 20, "999999999M"],
    "--samples": [*NOT_INTEGERS, "0", "-1"],
    "--questions": ["x", "0"],
    "--batch-size": ["x", "0"],
    "--answer-tokens": ["x", "0"],
    "--suite": ["", ",", "nolima", "mrcr", "ruller"],
    "--data": ["", "x", "=", "ruler=", "=x", "nolima=/nowhere"],
    "--dtype": ["int8"],
    "--device": ["tpu"],
}
DEMO = {
    "--tokens": [*NOT_INTEGERS, "-1", "2047", HUGE],
    "--seed": ["x", "-1", HUGE],
    "--model": ["", "x", "smollm2-135m"],
}
BENCH = {"--device": ["tpu", ""]}


CONTEXTS = {
    "--output": [""],
    "--model": ["", "/nowhere"],
    "--dtype": ["int8"],
    "--kv-dtype": ["", "fp8"],
    "--device": ["tpu"],
}
CHAT = {**SHARED, "--max-new-tokens": [*NOT_INTEGERS, "0", "-1"]}
PLAN = {
    "--context": ["", "x", "0", "-1", "1e3", "K", "1G", "9" * 20],
    "--device-memory": ["", "x", "GB", "32", "-1GB", "nanGB", "infGB", "1e99GB", "0GB", "1XB"],
    "--dtype": ["", "int8", "float64"],
    "--kv-dtype": ["", "int4"],
}


def cases(start, options):
    return [(start, option, value) for option, values in options.items() for value in values]


CASES = [
    *cases(["ask", "DOC", "-q", "x"], SHARED),
    *cases(["generate", "x"], SHARED),
    *cases(["eval", "--no-cache"], EVAL),
    *cases(["ingest", "DOC", "-o", "a.ctx"], CONTEXTS),
    *cases(["chat"], {**CHAT, "--host-memory": ["", "x", "0MB", "-1GB"], "--device-memory": ["x", "1GB"]}),
    *cases(["plan"], PLAN),
    *cases(["demo"], DEMO),
    *cases(["bench", "ops"], BENCH),
]


def check_refused(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["opensala", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, ""), err
    # said once in a process, by whatever test loads a model first
    err = "".join(line for line in err.splitlines(True) if not line.startswith("note: dtype auto "))
    assert err.startswith("opensala: ") and err.endswith("\n") and err.count("\n") == 1 and len(err) > 15
    return err


@pytest.mark.parametrize(
    ("start", "option", "value"), CASES, ids=[f"{s[0]} {o} {v[:12]!r}" for s, o, v in CASES]
)
def test_a_bad_value(monkeypatch, capsys, tmp_path, start, option, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text("The access code for old-mill is 90217.")
    words = ["doc.txt" if word == "DOC" else word for word in start]
    name = option.lstrip("-").replace("-", "_")
    err = check_refused(monkeypatch, capsys, [*words, option, value])
    said = err.replace("-", "_")
    told = {"max_new_tokens": "tokens", "lengths": "length", "model": "checkpoint", "seed": "seed"}
    assert name in said or told.get(name, name) in said, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["doc.txt"], "something was begun"


@pytest.mark.parametrize(
    "arguments",
    [["ask"], ["ask", "-q"], ["ask", "-q", "x"], ["ask", "doc"], ["generate"],
     ["generate", "a", "b"], ["--nothing"], ["nothing"], ["bench", "nothing"], ["eval", "a", "b", "c"],
     ["ask", "--json=yes", "d", "-q", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_words_missing_or_too_many(monkeypatch, capsys, arguments):
    check_refused(monkeypatch, capsys, arguments)
