"""The texts of a conversion: packed folders, files, and what does not fit into memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

import opensala.convert.batches as batches_module
from opensala.convert import convert
from opensala.convert.batches import Batches, parted, user_texts
from opensala.data.pack import pack, parse_sources

pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_of_a_packed_folder_is_trained_on(config, teacher_folder, tmp_path):
    rows = [f"Row {n} of the ledger: {n * 31 % 997} sacks of barley went to the mill." for n in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    made = pack(parse_sources([str(tmp_path / "a.jsonl")]), tokenizer, tmp_path / "packed")
    batches = Batches(tokenizer, replace(config, data=(str(tmp_path / "packed"),), task_share=0.0))
    count = made.tokens["a"] // config.length
    drawn = batches.train("align", 0, count).ids
    assert len({row.numpy().tobytes() for row in drawn}) == count  # an epoch has every row once
    held, size = np.load(tmp_path / "packed" / "held_out" / "a.npy"), config.probes.length
    assert batches.text_probes(1)[0].tolist() in held[: len(held) // size * size].reshape(-1, size).tolist()
    ids, marks = batches.recall_probes(128, 2)
    assert ids.shape == (2, 128) and marks.any()
    folder = convert(replace(config, data=(str(tmp_path / "packed"),)), tmp_path / "run", quiet=True)
    assert (folder / "config.json").exists()


def test_more_text_than_is_read_into_memory_is_not_left_out_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("a line of text\n" * 400)
    with pytest.raises(ValueError, match="more than the 3,000 characters .*convert pack"):
        user_texts([str(tmp_path / "a.txt")])


def test_no_document_lies_on_both_sides():
    """Long documents are read in pieces; of fewer than twelve, pieces are held out."""
    texts = [f"{n:02}; " * 11_000 for n in range(24)]
    train, held = ({piece[:2] for piece in part} for part in parted(texts))
    assert held == {"11", "23"} and train | held == {text[:2] for text in texts} and not train & held
    train, held = parted(texts[:11])
    assert "".join(sorted(train + held)) == "".join(texts[:11]) and 0 < len(held) <= len(train) / 10
    assert parted(["one", "two"]) == (["one"], ["two"])


def test_texts_are_read_as_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert user_texts([str(tmp_path / "*.jsonl")]) == ["first", "second"]
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\nbroken\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 is not JSON"):
        user_texts([str(tmp_path)])
