"""Packed tokens: every document once on one side, shares in tokens, whole or not at all."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from opensala.data.pack import HELD_OUT, Packed, PackSource, Tokens, pack, parse_sources
from opensala.engine import shipped_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model())


def lines(path, count, word="owl", start=0):
    rows = ({"text": f"{word} {n} sat on the {n * 7 % 13}th branch."} for n in range(start, start + count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(folder, part, name, tokenizer):
    """The texts in a packed array."""
    file = folder / part / f"{name}.npy"
    if not file.exists():
        return []
    ids = np.load(file)
    ends = np.flatnonzero(ids == Tokens(tokenizer).end)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)]


def test_every_document_is_used_once_on_one_side(tokenizer, tmp_path):
    file = lines(tmp_path / "owls.jsonl", 2500)
    made = pack(parse_sources([str(file)]), tokenizer, tmp_path / "out")
    train, held = (documents(tmp_path / "out", part, "owls", tokenizer) for part in ("train", "held_out"))
    assert sorted([*train, *held]) == sorted(
        json.loads(line)["text"] for line in file.read_text().splitlines()
    )
    assert 0.5 / HELD_OUT < len(held) / 2500 < 2 / HELD_OUT
    assert made.tokens["owls"] == len(np.load(tmp_path / "out" / "train" / "owls.npy"))
    assert train[:50] != sorted(train, key=lambda t: int(t.split()[1]))[:50]  # in an order of the seed's


def test_a_document_is_on_its_side_whatever_stands_around_it(tokenizer, tmp_path):
    lines(tmp_path / "a.jsonl", 1500)
    lines(tmp_path / "b.jsonl", 900, start=600)
    pack(parse_sources([str(tmp_path / "a.jsonl")]), tokenizer, tmp_path / "one", seed=1)
    pack(parse_sources([str(tmp_path / "b.jsonl")]), tokenizer, tmp_path / "two", seed=2)
    held, other = (
        {t for t in documents(tmp_path / folder, "held_out", name, tokenizer) if int(t.split()[1]) >= 600}
        for folder, name in (("one", "a"), ("two", "b"))
    )
    assert held == other and held


@pytest.mark.parametrize("count", [1, 2, 7, 63])
def test_small_sources_hold_something_out(tokenizer, tmp_path, count):
    if count == 1:
        (tmp_path / "s.txt").write_text("\n".join(f"line {n} of one long document" for n in range(300)))
    else:
        lines(tmp_path / "s.jsonl", count)
    path = next(tmp_path.glob("s.*"))
    made = pack(parse_sources([str(path)]), tokenizer, tmp_path / "out")
    assert made.tokens["s"] >= made.held_out["s"] > 0


def test_shares_are_kept_in_tokens(tokenizer, tmp_path):
    for name, count in (("many", 2000), ("few", 100)):
        lines(tmp_path / f"{name}.jsonl", count)
    given = [f"{tmp_path / 'many.jsonl'}=3", f"{tmp_path / 'few.jsonl'}=1"]
    made = pack(parse_sources(given), tokenizer, tmp_path / "out")
    assert made.tokens["many"] == pytest.approx(3 * made.tokens["few"], rel=0.01)
    assert set(made.repeated) == {"few"} and made.repeated["few"] > 5
    few = np.load(tmp_path / "out" / "train" / "few.npy")
    once = int(round(len(few) / made.repeated["few"]))
    np.testing.assert_array_equal(few[:once], few[once : 2 * once])
    cut = pack(parse_sources(given), tokenizer, tmp_path / "cut", tokens=4000)
    assert cut.tokens == {"many": 3000, "few": 1000} and cut.held_out["many"] > 0
    with pytest.raises(ValueError, match="tokens: 3 leave none for .*few.jsonl at its share"):
        pack(parse_sources(given), tokenizer, tmp_path / "none", tokens=3)
    plain = pack(parse_sources([g[:-2] for g in given]), tokenizer, tmp_path / "plain", tokens=4000)
    assert sum(plain.tokens.values()) == 4000


def test_conversations_and_ids_are_packed_too(tokenizer, tmp_path):
    talk = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
    rows = [talk, {"input_ids": [5, 6, 7]}, *({"text": f"t {n}"} for n in range(70))]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(parse_sources([str(tmp_path / "m.jsonl")]), tokenizer, tmp_path / "out")
    texts = [t for part in ("train", "held_out") for t in documents(tmp_path / "out", part, "m", tokenizer)]
    assert "Who?\nAnswer: Me." in texts and tokenizer.decode([5, 6, 7]) in texts and len(texts) == 72


def test_a_folder_is_used_again_or_refused(tokenizer, tmp_path, monkeypatch):
    file = lines(tmp_path / "a.jsonl", 200)
    first = pack(parse_sources([str(file)]), tokenizer, tmp_path / "out")
    assert pack(parse_sources([str(file)]), tokenizer, tmp_path / "out").record == first.record
    with pytest.raises(ValueError, match="packed from other sources"):
        pack(parse_sources([str(file)]), tokenizer, tmp_path / "out", seed=1)
    lines(file, 201)
    with pytest.raises(ValueError, match="packed from other sources"):
        pack(parse_sources([str(file)]), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no packed tokens"):
        Packed(tmp_path)


def test_what_fails_leaves_nothing(tokenizer, tmp_path):
    file = lines(tmp_path / "a.jsonl", 100)
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"a.jsonl line 101 is not JSON"):
        pack(parse_sources([str(file)]), tokenizer, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl"}
    made = pack(parse_sources([str(file)]), tokenizer, tmp_path / "out", skip_bad=True)
    assert made.record["skipped"] == {"a": 1}
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [999999]}\n' * 3)
    with pytest.raises(ValueError, match="token 999999 is beyond the vocabulary"):
        pack([PackSource("ids", str(tmp_path / "ids.jsonl"))], tokenizer, tmp_path / "other")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_a_source_without_texts_is_refused(tokenizer, tmp_path, content):
    """Beside a good one too, in whose place nothing is left."""
    (tmp_path / "none.jsonl").write_text(content)
    good, none = str(lines(tmp_path / "a.jsonl", 100)), str(tmp_path / "none.jsonl")
    for given in ([none], [good, none], [f"{good}=0.5", f"{none}=0.5"]):
        with pytest.raises(ValueError, match="none.jsonl holds no (documents|texts)"):
            pack(parse_sources(given), tokenizer, tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "none.jsonl"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["{a}=x"], "the share must be a number, got 'x'"),
        (["{a}=0"], "the share must be above 0"),
        (["{a}=1", "{a}"], "every source a share .* or none"),
        ([], "there is no source"),
        (["/nowhere/x.jsonl"], "holds no documents"),
    ],
)
def test_sources_are_checked(tmp_path, given, says):
    file = lines(tmp_path / "a.jsonl", 3)
    with pytest.raises(ValueError, match=says):
        parse_sources([g.format(a=file) for g in given])


def test_sources_of_one_name_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "a.jsonl", 3)
    found = parse_sources(
        [str(tmp_path / "x" / "a.jsonl"), str(tmp_path / "y" / "a.jsonl"), str(tmp_path / "x")]
    )
    assert [source.name for source in found] == ["a", "a-2", "x"]


def test_tokens_of_another_vocabulary_are_refused(tokenizer, tmp_path):
    made = pack(parse_sources([str(lines(tmp_path / "a.jsonl", 100))]), tokenizer, tmp_path / "out")
    made.check_tokenizer(tokenizer)
    other = AutoTokenizer.from_pretrained(shipped_model())
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="packed with another tokenizer"):
        made.check_tokenizer(other)
