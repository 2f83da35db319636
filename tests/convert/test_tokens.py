"""Packed tokens: text of any length, tasks with their answers, and nothing of what is held out."""

import numpy as np
import pytest

from opensala.convert.tokens import PackedTokens, Shuffled


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3000, dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.arange(3000, 5000, dtype=np.int32))
    tasks = np.arange(40 * 16, dtype=np.uint16).reshape(40, 16)
    np.save(tmp_path / "tasks.npy", tasks)
    np.save(tmp_path / "tasks.answers.npy", tasks % 5 == 0)
    return tmp_path


def test_an_epoch_shows_every_sequence_once_and_nothing_held_out(folder):
    packed = PackedTokens([str(folder)], 5000)
    for length in (10, 37):
        held = set(packed.held_out(length, 0, 10**6)[:, 0].tolist())
        rows = sum((n // length) - max(1, n // length // 64) for n in (3000, 2000))
        text = packed.text(length, 0, 0, rows)
        assert text.shape == (rows, length) and len(set(text[:, 0].tolist())) == rows
        assert not held & set(text.flatten().tolist()) and 1 <= len(held) <= 10
        assert (np.diff(text.astype(int), axis=1) == 1).all()
        later = packed.text(length, 0, 5, 20)
        assert np.array_equal(later, text[5:25])
        assert not np.array_equal(packed.text(length, 1, 0, 20), text[:20])
        assert not np.array_equal(packed.text(length, 0, rows, 20), text[:20])  # the next epoch


def test_tasks_come_with_their_marks(folder):
    packed = PackedTokens([str(folder)], 5000)
    assert packed.has_tasks(16) and not packed.has_tasks(10)
    found = packed.tasks(16, 3, 0, 40)
    assert len({int(ids[0]) for ids, _ in found}) == 40
    assert all(np.array_equal(marks, ids % 5 == 0) for ids, marks in found)


def test_the_fingerprint_is_of_every_byte(folder):
    before = PackedTokens([str(folder)], 5000).fingerprint
    assert PackedTokens([str(folder)], 9999).fingerprint == before
    changed = np.load(folder / "tasks.answers.npy")
    changed[39, 15] ^= True
    np.save(folder / "tasks.answers.npy", changed)
    assert PackedTokens([str(folder)], 5000).fingerprint != before


def test_what_holds_no_packed_tokens_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "bad.npy").write_text("x")
    np.save(tmp_path / "float.npy", np.zeros(4))
    np.save(tmp_path / "lonely.npy", np.zeros((2, 3), np.uint16))
    for name, message in (
        ("empty", "no .npy file and no folder with any"),
        ("text.txt", "no .npy file"),
        ("absent.npy", "no .npy file"),
        ("bad.npy", "is no NumPy array"),
        ("float.npy", r"must hold token ids .* got float64 \[4\]"),
        ("lonely.npy", "lonely.answers.npy with their answers is missing"),
        ("tasks.npy", "there is no text"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedTokens([str(tmp_path / name)], 5000)
    with pytest.raises(ValueError, match="b.npy has ids 3000 to 4999, the vocabulary is 4,000"):
        PackedTokens([str(folder / "b.npy")], 4000)
    with pytest.raises(ValueError, match="does not fill a sequence of 4,000 tokens"):
        PackedTokens([str(folder / "a.npy")], 5000).text(4000, 0, 0, 1)


def test_an_order_is_a_permutation_of_each_epoch():
    order = Shuffled(7)
    drawn = order.draw(0, 0, 21)
    assert all(sorted(drawn[a : a + 7]) == list(range(7)) for a in (0, 7, 14))
    assert drawn[3:9] == Shuffled(7).draw(0, 3, 6)
