"""Held-out texts by kind."""

import json

import pytest

from opensala.data.heldout import texts_by_group


def test_documents_come_by_group_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "heldout.jsonl"
    entries = [("b", "first"), ("a", "é\n"), ("b", "second, longer")]
    path.write_text("".join(json.dumps({"text": t, "group": g, "more": 1}) + "\n" for g, t in entries))
    assert list(texts_by_group(path).items()) == [("a", ["é\n"]), ("b", ["first", "second, longer"])]


@pytest.mark.parametrize("line", ["", "{", "[]", "3", '{"text": "x"}'])
def test_another_line_is_named(tmp_path, line):
    path = tmp_path / "heldout.jsonl"
    path.write_text('{"text": "x", "group": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"heldout.jsonl, line 2: must be a JSON object"):
        texts_by_group(path)
