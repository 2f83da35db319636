"""LiveCodeBench in its published form: tests decoded without running pickles, its rules for outputs, both
kinds of problems."""

import base64
import json
import pickle
import zlib

import pytest
from transformers import AutoTokenizer

from opensala.data.prompts import PromptFormat
from opensala.engine import shipped_model
from opensala.evaluate.lcb_tests import ProgramTest, decode_tests, extract_code, passes, same_output
from opensala.evaluate.livecodebench import LiveCodeBenchSuite
from opensala.evaluate.sandbox import Limits


def packed(tests, dump=pickle.dumps):
    return base64.b64encode(zlib.compress(dump(json.dumps(tests)))).decode()


ADD = {
    "question_title": "Add",
    "question_content": "Two numbers a and b. Print their sum.",
    "platform": "atcoder",
    "question_id": "abc1_a",
    "contest_id": "abc1",
    "contest_date": "2024-12-07T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "metadata": "{}",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "10\n20\n", "output": "30\n", "testtype": "stdin"}]),
}
LARGEST = {
    "question_title": "Largest",
    "question_content": "Return the largest value and its index.",
    "platform": "leetcode",
    "question_id": "3999",
    "contest_id": "w1",
    "contest_date": "2025-03-02T00:00:00",
    "starter_code": "class Solution:\n    def largest(self, values):\n        ",
    "difficulty": "easy",
    "metadata": json.dumps({"func_name": "largest"}),
    "public_test_cases": json.dumps([{"input": "[1, 9, 3]", "output": "[9, 1]", "testtype": "functional"}]),
    "private_test_cases": packed([{"input": "[4]", "output": "[4, 0]", "testtype": "functional"}]),
}
SOLUTIONS = {
    "abc1_a": "a, b = map(int, sys.stdin.read().split())\nprint(a + b)",
    "3999": "class Solution:\n    def largest(self, values: List[int]):\n        return max(values), "
    "values.index(max(values))",
}


def fenced(code):
    return f"First I think.\n```python\nprint('a draft')\n```\nNow the program:\n```python\n{code}\n```\n"


@pytest.fixture(scope="module")
def form():
    return PromptFormat(AutoTokenizer.from_pretrained(shipped_model()))


def write(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_both_kinds_of_problems(form, tmp_path):
    suite = LiveCodeBenchSuite(
        write(
            tmp_path, problems=[ADD, LARGEST, ADD | {"question_id": "old", "contest_date": "2023-05-01"}, ADD]
        )
    )
    groups = list(suite.groups(form))
    assert [g.ids for g in groups] == [("livecodebench/v5/abc1_a",), ("livecodebench/v6/3999",)]
    for group in groups:
        (sample,) = group.load()
        code = SOLUTIONS[sample.id.split("/")[-1]]
        assert (
            sample.score(fenced(code)) == 1.0 and sample.score(code) == 0.0
        )  # a program outside a block was not handed in
        assert sample.score(fenced(code.replace("a + b", "a - b").replace("max", "min"))) == 0.0
        assert sample.references == ("2 tests",) and sample.task in ("livecodebench_v5", "livecodebench_v6")
        text = form.tokenizer.decode(sample.prompt)
        assert ("def largest" in text) == ("3999" in sample.id) and ("standard input" in text) == (
            "abc1_a" in sample.id
        )
    private = LARGEST | {
        "private_test_cases": packed([{"input": "[4]", "output": "[5, 0]", "testtype": "functional"}])
    }
    (group,) = LiveCodeBenchSuite(write(tmp_path, problems=[private]), ("v6",)).groups(form)
    assert group.load()[0].score(fenced(SOLUTIONS["3999"])) == 0.0  # private tests count


def test_versions_by_file_name(form, tmp_path):
    write(
        tmp_path,
        test=[ADD],
        test5=[ADD | {"contest_date": "2024-08-10"}],
        test6=[LARGEST | {"contest_date": "2025-01-04"}],
    )
    assert [g.ids[0] for g in LiveCodeBenchSuite(tmp_path).groups(form)] == [
        "livecodebench/v5/abc1_a",
        "livecodebench/v6/3999",
    ]
    assert [g.ids[0] for g in LiveCodeBenchSuite(tmp_path / "test5.jsonl", ("v5",)).groups(form)] == [
        "livecodebench/v5/abc1_a"
    ]
    with pytest.raises(
        ValueError,
        match=r"no problem of LiveCodeBench v6 in it: it needs test6.jsonl, or contest dates from 2025-02-01",
    ):
        LiveCodeBenchSuite(tmp_path / "test5.jsonl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_packed_tests(protocol):
    tests = [{"input": "é\u2028" * 50_000, "output": "1", "testtype": "stdin"}]
    found = decode_tests(packed(tests, lambda text: pickle.dumps(text, protocol)), "x")
    assert found == [ProgramTest(tests[0]["input"], "1", False)]


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/opensala-evil", "w"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(Evil()), "more than one string: it has the instruction"),
        (pickle.dumps([]), "instruction EMPTY_LIST"),
        (pickle.dumps(("[]", "[]")), "instruction BINGET"),
        (b"cos\nsystem\n(S'true'\ntR.", "instruction GLOBAL"),
        (b"\x80\x04\x8c\x02[]r\xff\xff\xff\x7fN0.", "instruction NONE"),
        (b"\x80\x04.", "0 strings instead of one"),
        (pickle.dumps("[]")[:-3], "x, field 'private_test_cases'"),
        (b"", "x, field 'private_test_cases'"),
        (pickle.dumps("{}"), "must be a list of tests"),
        (pickle.dumps('[{"input": 1}]'), "test 1: must have the strings input, output and testtype"),
        (
            pickle.dumps('[{"input": "", "output": "", "testtype": "file"}]'),
            "testtype must be stdin or functional, got 'file'",
        ),
    ],
)
def test_pickles_are_not_run(data, message):
    with pytest.raises(ValueError, match=message):
        decode_tests(base64.b64encode(zlib.compress(data)).decode(), "x, field 'private_test_cases'")


@pytest.mark.parametrize("text", ["", "!!!", "[1", base64.b64encode(b"not zlib").decode(), packed([])[:20]])
def test_what_is_not_packed_tests(text):
    with pytest.raises(ValueError, match="neither a JSON list of tests nor LiveCodeBench's packed form"):
        decode_tests(text, "x")


def test_a_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr("opensala.evaluate.lcb_tests.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 bytes unpacked"):
        decode_tests(packed(["x" * 5000]), "x")


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("3\n", "3", True),
        (" 3 \n4\n\n", "3\n4 ", True),
        ("3\n\n4", "3\n4", False),
        ("3.0 4", "3 4.00", True),
        ("0.1", "0.1000001", False),
        ("Yes", "YES", False),
        ("1 2", "1 2 3", False),
        ("", "", True),
        ("nan", "nan", True),
        ("1 x", "1.0 x", False),
    ],
)
def test_when_outputs_are_the_same(printed, wanted, same):
    assert same_output(printed, wanted) is same


def test_code_blocks():
    assert extract_code(fenced("x = 1")) == "x = 1\n"
    assert extract_code("x = 1") == extract_code("```python\nx = 1") == ""
    assert extract_code("```\na\n```\n and ``inline`` ```b```") == "a\n"


def test_limits_hold_in_a_problem():
    endless = [ProgramTest("", "1", False)]
    assert not passes("while True: pass", endless, "", Limits(0.5)) and passes(
        "print(1)", endless, "", Limits()
    )
    assert not passes("", endless, "", Limits())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metadata": "{}"},
            r"problems.jsonl, line 1: field 'metadata' must name the function to call as func_name, got None",
        ),
        ({"metadata": "x"}, "field 'metadata' must be a JSON object"),
        ({"public_test_cases": "x"}, "line 1, field 'public_test_cases': neither"),
        ({"contest_date": "soon"}, "field 'contest_date' must begin with a date"),
        ({"starter_code": None}, "field 'starter_code' must be a string, got null"),
    ],
)
def test_bad_files(form, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        [
            g.load()
            for g in LiveCodeBenchSuite(write(tmp_path, problems=[LARGEST | change]), ("v6",)).groups(form)
        ]
