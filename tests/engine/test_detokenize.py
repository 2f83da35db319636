"""Text as it comes: characters cut between tokens, and stop texts that span them."""

import random

import pytest
from transformers import AutoTokenizer

from opensala.engine import shipped_model
from opensala.engine.detokenize import Detokenizer


class Bytes:
    """A tokenizer whose tokens are bytes, as the worst case of byte-level BPE."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(t for t in tokens if not skip_special_tokens or t != 0).decode("utf-8", errors="replace")


def stream(text, stop=()):
    one, parts = Detokenizer(Bytes(), stop), []
    for token in text.encode():
        parts.append(one.add(token))
        if one.stopped:
            break
    parts.append(one.finish())
    return parts, one


@pytest.mark.parametrize("text", ["plain", "naïve – 日本語 🙂🙂", "🙂", "\n\n", "a\ufffdb"])
def test_no_character_is_cut(text):
    parts, one = stream(text)
    assert "".join(parts) == one.text == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_bytes_that_are_no_text_come_at_the_end():
    one = Detokenizer(Bytes())
    assert [one.add(b) for b in b"a\xf0\x9f"] == ["a", "", ""]
    assert one.finish() == "\ufffd" and one.text == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("48213\nQuestion: and", ("\nQuestion:",), "48213"),
        ("a\nQuest is not it\nQuestion:", ("\nQuestion:",), "a\nQuest is not it"),
        ("one two three", ("three", "two"), "one "),
        ("aaab", ("aab",), "a"),
        ("日本語", ("本",), "日"),
        ("stop", ("stop",), ""),
        ("nothing here", ("xyz",), "nothing here"),
        ("ends with a beginning \nQue", ("\nQuestion:",), "ends with a beginning \nQue"),
    ],
)
def test_an_answer_ends_before_a_stop_text(text, stop, wanted):
    parts, one = stream(text, stop)
    assert "".join(parts) == one.text == wanted
    assert one.stopped == (wanted != text) and (one.stop in stop if one.stopped else one.stop is None)


def test_random_texts_with_random_stops():
    """What is handed out piece by piece is always the beginning of the final text, cut at the first stop."""
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab é🙂") for _ in range(rng.randint(0, 30)))
        stop = tuple(
            "".join(rng.choice("abé") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))
        )
        parts, one = stream(text, stop)
        # the stop that is complete first ends the text
        ends = [text.find(s) + len(s) for s in stop if s in text]
        done = min(ends, default=None)
        if done is None:
            assert "".join(parts) == text
        else:
            starts = [text.find(s) for s in stop if s in text[:done]]
            assert "".join(parts) == one.text == text[: min(starts)]


def test_without_a_tokenizer_there_is_no_text():
    one = Detokenizer(None)
    assert one.add(5) == "" and one.finish() == "" and one.text == ""


@pytest.mark.parametrize("cleans_up", [False, True])
@pytest.mark.parametrize("keep_special", [False, True])
def test_texts_are_those_of_the_tokenizer(cleans_up, keep_special, monkeypatch):
    """Whether transformers' own decoding is gone through or only its backend's."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", cleans_up)
    one = Detokenizer(tokenizer, keep_special=keep_special)
    assert (one._decoder is tokenizer) == cleans_up
    rng = random.Random(0)
    tokens = [rng.randrange(len(tokenizer)) for _ in range(300)] + [tokenizer.eos_token_id, 300]
    text = "".join([*map(one.add, tokens), one.finish()])
    assert text == tokenizer.decode(tokens, skip_special_tokens=not keep_special)
