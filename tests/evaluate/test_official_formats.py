"""MRCR and NoLiMa: files made here in the published formats, the published rules, and what is wrong with a
file."""

import json

import pytest
from transformers import AutoTokenizer

from opensala.data.prompts import PromptFormat
from opensala.engine import shipped_model
from opensala.evaluate.mrcr import MRCRSuite, bin_of
from opensala.evaluate.nolima import Book, NoLiMaSuite, effective_length, read_needles


@pytest.fixture(scope="module")
def form():
    return PromptFormat(AutoTokenizer.from_pretrained(str(shipped_model())))


def conversation(turns, needles=2):
    messages = [
        {
            "role": "user" if i % 2 == 0 else "assistant",
            "content": f"Turn {i}: " + "a long story about hills and rain. " * 8,
        }
        for i in range(turns)
    ]
    messages.append(
        {
            "role": "user",
            "content": "Prepend q7XyZ12abc to the 2nd (1 indexed) story. Do not include any other text.",
        }
    )
    return {
        "prompt": json.dumps(messages),
        "answer": "q7XyZ12abcA story of the second kind.",
        "random_string_to_prepend": "q7XyZ12abc",
        "n_needles": needles,
        "desired_msg_index": 3,
        "total_messages": turns + 1,
        "n_chars": 1,
    }


def test_mrcr(form, tmp_path):
    rows = [conversation(60), conversation(60, 4), conversation(120), conversation(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = [s for g in MRCRSuite(tmp_path / "rows.jsonl").groups(form) for s in g.load()]
    assert [(s.id, s.task, s.length) for s in samples] == [
        ("mrcr/rows/1", "mrcr_2needle", 8192),
        ("mrcr/rows/2", "mrcr_4needle", 8192),
        ("mrcr/rows/3", "mrcr_2needle", 16384),
    ]
    assert (
        samples[0].score("q7XyZ12abcA story of the second kind.") == 1.0
        and samples[0].score("A story of the second kind.") == 0.0
    )
    assert [s.id for g in MRCRSuite(tmp_path, (8192,), samples=1).groups(form) for s in g.load()] == [
        "mrcr/rows/1",
        "mrcr/rows/2",
    ]
    with pytest.raises(ValueError, match="upper end of a bin, one of 8192, 16384"):
        MRCRSuite(tmp_path, (8000,))


def test_mrcr_parquet(form, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([conversation(60)]), tmp_path / "2needle.parquet")
    (sample,) = [s for g in MRCRSuite(tmp_path).groups(form) for s in g.load()]
    assert sample.id == "mrcr/2needle/1" and "Turn 59" in form.tokenizer.decode(sample.prompt)
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "[]"}]), tmp_path / "2needle.parquet")
    with pytest.raises(ValueError, match=r"2needle\.parquet, row 1: field 'answer' is missing"):
        list(MRCRSuite(tmp_path).groups(form))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "not json"}, "row 1: field 'prompt' must be a JSON list of messages"),
        ({"prompt": '[{"role": "user"}]'}, "field 'prompt': field 'content' is missing"),
        ({"n_needles": "2"}, "line 1: field 'n_needles' must be an integer"),
    ],
)
def test_bad_mrcr(form, tmp_path, change, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(conversation(60) | change) + "\n")
    with pytest.raises(ValueError, match=message):
        list(MRCRSuite(tmp_path / "a.jsonl").groups(form))


def test_bins_are_closed_on_the_right():
    assert [bin_of(n) for n in (4096, 4097, 8192, 8193, 2**20, 2**20 + 1)] == [0, 8192, 8192, 16384, 2**20, 0]


NEEDLE = {
    "id": "0401Inv",
    "reasoning_type": "x",
    "system_prompt": "",
    "needle": "{CHAR} keeps a boat at {1}.",
    "questions": {"onehop": "Who has been at {2}?", "direct": "Who keeps a boat at {1}?"},
    "tests": {
        "T01": {"input_args": ["the old pier", "the sea"]},
        "T02": {"input_args": ["Lake Orm", "a lake"]},
    },
    "character_set": ["Yuki", "Stuart", "Veronica"],
}


@pytest.fixture
def nolima(tmp_path):
    (tmp_path / "needlesets").mkdir()
    (tmp_path / "haystack" / "rand_shuffle").mkdir(parents=True)
    (tmp_path / "needlesets" / "needle_set.json").write_text(json.dumps([NEEDLE]))
    (tmp_path / "haystack" / "rand_shuffle" / "rand_book_1.txt").write_text(
        "".join(f"Line {i} of the book is short.\n" for i in range(400))
    )
    (tmp_path / "template.txt").write_text("Book:\n{haystack}\n\nQ: {question}\nShort answer:")
    return tmp_path


def test_nolima(form, nolima):
    suite = NoLiMaSuite(nolima, (250, 1000), samples=3)
    samples = [s for g in suite.groups(form) for s in g.load()]
    assert len(samples) == 2 * 2 * 2 * 3  # lengths, questions, tests, depths
    assert {s.task for s in samples} == {"nolima_onehop", "nolima_direct"} and {s.depth for s in samples} == {
        0.0,
        0.48,
        1.0,
    }
    for sample in samples:
        text = form.tokenizer.decode(sample.prompt)
        (name,) = sample.references
        place, seen = ("the old pier", "the sea") if "/T01/" in sample.id else ("Lake Orm", "a lake")
        assert name in NEEDLE["character_set"] and f" {name} keeps a boat at {place}.\n" in text
        assert (
            "Who has been at " + seen if "onehop" in sample.id else "Who keeps a boat at " + place
        ) in text
        assert abs(len(sample.prompt) - sample.length) < 80
        found = text.index(f"{name} keeps") / len(text)
        assert abs(found - sample.depth) < (0.2 if sample.length == 250 else 0.08), (sample.id, found)
        assert sample.score(f"It is {name}.") == 1.0 and sample.score(name.lower()) == 0.0
    assert samples == [s for g in suite.groups(form) for s in g.load()] or [s.prompt for s in samples] == [
        s.prompt for g in suite.groups(form) for s in g.load()
    ]


def test_needles_stand_on_lines_of_their_own(form, nolima):
    book = Book(nolima / "haystack" / "rand_shuffle" / "rand_book_1.txt", form.tokenizer)
    for depth in (0.0, 0.3, 0.7, 1.0):
        before, after = book.place("NEEDLE", 500, depth).split(" NEEDLE\n")
        assert (before == "" or before.endswith(".\n")) and len(
            form.tokenizer(before + after)["input_ids"]
        ) in range(495, 506)
    with pytest.raises(
        ValueError, match=r"rand_book_1\.txt: has [\d,]+ tokens, a window of 100,000 was asked for"
    ):
        book.place("NEEDLE", 100_000, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "x"}, "item 1: field 'id' must begin with four digits"),
        ({"tests": {"T01": {}}}, "item 1, test 'T01': field 'input_args' is missing"),
        ({"character_set": []}, "field 'character_set' is missing"),
    ],
)
def test_bad_nolima(nolima, change, message):
    path = nolima / "needlesets" / "needle_set.json"
    path.write_text(json.dumps([NEEDLE | change]))
    with pytest.raises(ValueError, match=message):
        read_needles(path)


def test_nolima_needs_its_files(nolima, tmp_path):
    with pytest.raises(ValueError, match="rule must be one of contains, EM"):
        NoLiMaSuite(nolima, rule="contain")
    (nolima / "template.txt").write_text("{haystack}")
    with pytest.raises(ValueError, match=r"template\.txt: lacks \{question\}"):
        NoLiMaSuite(nolima)
    (nolima / "template.txt").unlink()
    with pytest.raises(ValueError, match=r"template\.txt: the prompt around book and question"):
        NoLiMaSuite(nolima)
    (nolima / "needlesets" / "needle_set.json").unlink()
    with pytest.raises(ValueError, match="found 0 needle sets and 1 books"):
        NoLiMaSuite(nolima)


def test_effective_length():
    assert effective_length({250: 90.0, 500: 100.0, 1000: 95.0, 2000: 86.0, 4000: 80.0, 8000: 99.0}) == (
        100.0,
        2000,
    )
    assert effective_length({1000: 50.0, 2000: 0.0}) == (50.0, 1000)
    with pytest.raises(ValueError, match="base score needs one of the lengths"):
        effective_length({32000: 1.0})
