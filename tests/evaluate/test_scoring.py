"""The scorers against the official rules, worked out by hand, and the files they are applied to."""

import json
from difflib import SequenceMatcher

import pytest

from opensala.evaluate.ruler_files import score_file, task_of
from opensala.evaluate.scoring import (
    NOLIMA_RULES,
    clean,
    mrcr_ratio,
    string_match_all,
    string_match_part,
    without_thoughts,
)


def test_ruler_all():
    assert string_match_all("The numbers are 111 and 333.", ["111", "222", "333", "444"]) == 0.5
    assert string_match_all("ALPHA\x00beta", ["alpha", "Beta"]) == 1.0
    assert string_match_all("", ["1"]) == 0.0
    assert clean(" a\x01b \x1f") == "a\nb"


def test_ruler_part_is_the_maximum_over_references():
    """One of three references is enough for 1; dividing by three (a known mistake) would give 0.333."""
    assert string_match_part("It is Denver", ["Denver", "Denver, Colorado", "the city of Denver"]) == 1.0
    assert string_match_part("it is denver", ["Boulder", "DENVER"]) == 1.0
    assert string_match_part("Boulder", ["Denver"]) == 0.0


def test_mrcr():
    answer = "aB3xY9kQ2zA poem about rivers,\nin two lines."
    prefix = "aB3xY9kQ2z"
    assert mrcr_ratio(answer, answer, prefix) == 1.0
    assert (
        mrcr_ratio(answer[10:], answer, prefix) == 0.0
    )  # the right text without the prefix is worth nothing
    assert mrcr_ratio(" " + answer, answer, prefix) == 0.0
    other = "A poem about hills."
    assert (
        mrcr_ratio(prefix + other, answer, prefix) == SequenceMatcher(None, other, answer[10:]).ratio() < 0.8
    )
    assert mrcr_ratio(prefix, prefix + "x", prefix) == 0.0


def test_nolima():
    assert NOLIMA_RULES["contains"]("It was Yuki.", ["Yuki"]) == 1.0
    assert NOLIMA_RULES["contains"]("it was yuki", ["Yuki"]) == 0.0  # case counts
    assert (
        NOLIMA_RULES["EM"](" Yuki\n", ["Yuki"]) == 1.0 and NOLIMA_RULES["EM"]("It was Yuki", ["Yuki"]) == 0.0
    )
    assert NOLIMA_RULES["lastline_contains"]("Yuki?\nNo: Stuart.", ["Yuki"]) == 0.0
    assert NOLIMA_RULES["lastline_EM"]("Well.\nStuart", ["Stuart"]) == 1.0


def test_thoughts():
    assert (
        without_thoughts("<think>a\nb</think>\n\nanswer") == "answer"
        and without_thoughts("answer") == "answer"
    )


def write(path, *records):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_scoring_files(tmp_path):
    rows = [
        {
            "index": 0,
            "pred": "Denver it is",
            "outputs": ["Denver", "Denver, Colorado", "Mile High City"],
            "input": "x",
            "others": {},
        },
        {"index": 1, "pred": " ", "outputs": ["Boulder"]},
        {"index": 2, "pred": "Reno", "outputs": ["reno", "Reno, Nevada"]},
    ]
    score = score_file(write(tmp_path / "qa_1.jsonl", *rows))
    assert (score.task, score.rule, score.score, score.samples, score.empty) == (
        "qa_1",
        "string_match_part",
        66.67,
        3,
        1,
    )
    assert (
        score_file(write(tmp_path / "vt.jsonl", {"pred": "AB CD", "outputs": ["AB", "CD", "EF"]})).score
        == 66.67
    )
    assert task_of(tmp_path / "cwe" / "validation.jsonl") == "cwe"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"vt\.jsonl, line 1: not JSON"),
        (['{"pred": "a", "outputs": ["b"]}', "[1]"], r"line 2: a list instead of an object"),
        (['{"outputs": ["b"]}'], r"line 1: field 'pred' is missing; the object has 'outputs'"),
        (['{"pred": 3, "outputs": ["b"]}'], r"field 'pred' must be a string, got 3"),
        (['{"pred": "a", "outputs": "b"}'], r"field 'outputs' must be a list, got \"b\""),
        (['{"pred": "a", "outputs": []}'], r"list of at least one string"),
        (["  "], "empty"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        score_file(write(tmp_path / "vt.jsonl", *lines))


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match=r"did you mean niah_single_1\.jsonl"):
        score_file(write(tmp_path / "niah_single1.jsonl", {"pred": "", "outputs": ["a"]}))
    with pytest.raises(ValueError, match="cannot be read"):
        score_file(tmp_path / "vt.jsonl")
