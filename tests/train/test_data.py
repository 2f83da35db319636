"""Documents, mixtures, packing, conversations and synthetic tasks; and that a position is exact."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import opensala.data.documents as reading
from opensala.data.documents import Files, TrainingDocument
from opensala.data.encode import Encoder, plain
from opensala.engine import shipped_model
from opensala.train.data import PackedSequence, StageData
from opensala.train.data.synthetic import Synthetic
from opensala.train.loss import IGNORED
from opensala.train.recipe import Source, Stage
from opensala.train.recipes import TINY_TEMPLATE
from opensala.train.schedule import Schedule

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model())


def with_template(tokenizer, template):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def stage(*mixture, sequence=96, **more):
    return Stage("s", sequence, 1000, 1000, Schedule("constant", 1e-3), mixture, **more)


def same(a, b):
    return torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) and a.bounds == b.bounds


def test_files_of_each_kind_give_their_documents(corpus, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    texts = [json.loads(line)["text"] for line in (corpus / "text.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pa.table({"text": texts[:12]}), tmp_path / "a.parquet", row_group_size=5)
    pyarrow.parquet.write_table(pa.table({"input_ids": [[5, 6, 7], [8, 9]]}), tmp_path / "b.parquet")
    for path, wanted in ((corpus / "text.jsonl", texts), (tmp_path / "a.parquet", texts[:12])):
        source = Files(str(path), "seed")
        epochs = [[source.next().text for _ in wanted] for _ in range(2)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(wanted) and epochs[0] != epochs[1]
        assert epochs[0] != wanted  # shuffled
    assert Files(str(corpus / "page.txt"), "s").next().text == (corpus / "page.txt").read_text()
    source = Files(str(tmp_path / "b.parquet"), "s")
    assert sorted([source.next().ids, source.next().ids]) == [[5, 6, 7], [8, 9]]
    with pytest.raises(ValueError, match="mixes Parquet with other files"):
        (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
        Files(str(tmp_path), "s")


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"text": 3}', "must have text"),
        ("[1, 2]", "must be a JSON object, got list"),
        ('{"text": "cut', "is not JSON"),
        ('{"messages": [{"content": "x"}]}', "must have role and content"),
        ('{"input_ids": [1, -2]}', "must have text"),
        ("{}", "it has nothing"),
    ],
)
def test_a_malformed_line_is_named_or_skipped_and_counted(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"text": "one"}}\n\n{line}\n{{"text": "two"}}\n')
    with pytest.raises(ValueError, match=rf"{file} line 3.*{message}.*--skip-bad-data"):
        Files(str(file), "s").next()
    source = Files(str(file), "s", skip_bad=True)
    assert sorted(source.next().text for _ in range(2)) == ["one", "two"] and source.skipped == 1
    file.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"holds no documents \(1 bad ones skipped\)"):
        Files(str(file), "s", skip_bad=True).next()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"cut.parquet cannot be read as Parquet"):
        Files(str(tmp_path / "*.parquet"), "s").next()
    file.write_bytes(b'{"text": "caf\xe9"}\n')
    assert "caf" in Files(str(file), "s").next().text


@pytest.mark.parametrize("block", [3, 1000])
def test_a_position_in_files_is_exact_everywhere(corpus, tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "_BLOCK", block)
    rows = (corpus / "text.jsonl").read_text().splitlines()[:8]
    for n, part in enumerate((rows[:3], rows[3:4], rows[4:])):
        (tmp_path / f"{n}.jsonl").write_text("\n".join([*part, "broken"]) + "\n")
    source = Files(str(tmp_path), "seed", skip_bad=True)
    states, seen = [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(source.state_dict())))
        seen.append(source.next().place)
    assert len(set(seen[:8])) == 8
    for n in range(0, 20, 3):
        again = Files(str(tmp_path), "seed", skip_bad=True)
        again.load_state_dict(states[n])
        assert [again.next().place for _ in range(20 - n)] == seen[n:]
        assert again.skipped == source.skipped


def test_packing_cuts_and_labels_within_documents(corpus, tokenizer):
    data = StageData(stage(Source("a", 1.0, str(corpus / "text.jsonl")), sequence=1500), tokenizer, 0)
    sequences = [data.next() for _ in range(8)]
    for s in sequences:
        assert (
            len(s.ids) == 1500
            and s.bounds[0] == 0
            and s.bounds[-1] == 1500
            and s.bounds == sorted(set(s.bounds))
        )
        for a, b in zip(s.bounds, s.bounds[1:], strict=False):
            assert torch.equal(s.labels[a : b - 1], s.ids[a + 1 : b]) and s.labels[b - 1] == IGNORED
    assert sum(len(s.bounds) > 2 for s in sequences) > 5
    texts = {
        tuple(tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]) + (2,)
        for line in (corpus / "text.jsonl").read_text().splitlines()
    }
    inner = [
        tuple(s.ids[a:b].tolist())
        for s in sequences
        for a, b in zip(s.bounds[1:-1], s.bounds[2:-1], strict=False)
    ]
    assert inner and all(piece in texts or any(t[-len(piece) :] == piece for t in texts) for piece in inner)


def test_packed_documents_do_not_see_each_other(corpus, tokenizer, model):
    """The loss of a packed row is the sum of the losses of its documents alone, gradients included."""
    from opensala.train.steps import _row_loss, packed_row

    data = StageData(stage(Source("a", 1.0, str(corpus / "chat.jsonl"))), tokenizer, 0)
    sequences = [data.next() for _ in range(3)]
    assert all(len(s.bounds) > 2 for s in sequences)
    sequences = [
        PackedSequence(s.ids % 97, torch.where(s.labels == IGNORED, IGNORED, s.labels % 97), s.bounds)
        for s in sequences
    ]
    model = model.double()
    together = _row_loss(model, **packed_row(sequences))
    alone = sum(
        _row_loss(model, input_ids=s.ids[None, a:b], targets=s.labels[None, a:b])
        for s in sequences
        for a, b in zip(s.bounds, s.bounds[1:], strict=False)
    )
    torch.testing.assert_close(together, alone)
    wanted = torch.autograd.grad(alone, list(model.parameters()))
    for got, want in zip(torch.autograd.grad(together, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_shares_are_kept_in_tokens_and_positions_are_exact(corpus, tokenizer):
    mixture = (
        Source("a", 3.0, str(corpus / "text.jsonl"), long_from=600, long_factor=2.0),
        Source("b", 1.0, str(corpus / "chat.jsonl")),
    )
    data = StageData(stage(*mixture), tokenizer, 0)
    states, seen = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(data.state_dict())))
        seen.append(data.next())
    assert data.tokens[0] / data.tokens[1] == pytest.approx(3.0, rel=0.3)
    for n in (0, 1, 17, 45):
        again = StageData(stage(*mixture), tokenizer, 0)
        again.load_state_dict(states[n])
        assert all(same(again.next(), wanted) for wanted in seen[n:])
    other = StageData(stage(*mixture), tokenizer, 1)
    assert not all(same(other.next(), wanted) for wanted in seen)


def test_longer_documents_are_taken_more_often(corpus, tokenizer):
    plainly = StageData(stage(Source("a", 1.0, str(corpus / "text.jsonl"))), tokenizer, 0)
    raised = StageData(
        stage(Source("a", 1.0, str(corpus / "text.jsonl"), long_from=600, long_factor=4.0)), tokenizer, 0
    )
    shares = []
    for data in (plainly, raised):
        lengths = [len(data._draw().ids) for _ in range(120)]
        shares.append(sum(n >= 600 for n in lengths) / sum(n < 600 for n in lengths))
    assert shares[1] / shares[0] == pytest.approx(4.0, rel=0.5)


@pytest.mark.parametrize("template", [TINY_TEMPLATE, CHATML])
def test_only_answers_are_learnt(corpus, tokenizer, template):
    own = with_template(tokenizer, template)
    messages = json.loads((corpus / "chat.jsonl").read_text().splitlines()[3])["messages"]
    example = Encoder(own, True)(TrainingDocument("x", messages=messages))
    assert (
        own.decode(example.ids)
        == own.apply_chat_template(messages, tokenize=False)[: len(own.decode(example.ids))]
    )
    learnt = own.decode(example.ids[example.learnt])
    assert "7" in learnt and "8" in learnt and "plus" not in learnt and "user" not in learnt
    prompt = own.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    ids = own(prompt, add_special_tokens=False)["input_ids"]
    assert (
        example.ids[: len(ids)].tolist() == ids
        and not example.learnt[: len(ids)].any()
        and example.learnt[len(ids)]
    )


def test_conversations_stay_whole(corpus, tokenizer):
    own = with_template(tokenizer, CHATML)
    chat = stage(Source("c", 1.0, str(corpus / "chat.jsonl")), chat=True, sequence=200)
    data = StageData(chat, own, 0)
    states, seen = [], []
    for _ in range(8):
        states.append(json.loads(json.dumps(data.state_dict())))
        seen.append(data.next())
    start = own("<|im_start|>user", add_special_tokens=False)["input_ids"]
    for s in seen:
        for a, b in zip(s.bounds, s.bounds[1:], strict=False):
            document = s.ids[a:b].tolist()
            assert document[: len(start)] == start or set(document) == {data.pad}
            assert (s.labels[a:b] != IGNORED).any() == (document[: len(start)] == start)
    again = StageData(chat, own, 0)
    again.load_state_dict(states[5])
    assert all(same(again.next(), wanted) for wanted in seen[5:])
    short = StageData(replace(chat, sequence=40), own, 0)
    with pytest.raises(ValueError, match="longer than a sequence"):
        short.next()


def test_conversations_that_cannot_be_learnt_are_refused(tokenizer):
    for template, messages, message in (
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2,
            "rewrites turns",
        ),
        (CHATML, [{"role": "user", "content": "a"}], "has no answer"),
    ):
        with pytest.raises(ValueError, match=message):
            Encoder(with_template(tokenizer, template), True)(TrainingDocument("x", messages=messages))
    with pytest.raises(ValueError, match="a chat stage needs messages"):
        Encoder(with_template(tokenizer, CHATML), True)(TrainingDocument("x", text="a"))
    with pytest.raises(ValueError, match="no chat template: give one with --chat-template"):
        Encoder(tokenizer, True)
    with pytest.raises(ValueError, match="token 5000 is beyond the vocabulary of 2048"):
        Encoder(tokenizer, False)(TrainingDocument("x", ids=[5000]))


@pytest.mark.parametrize("task", ["facts", "tracing", "cross"])
def test_synthetic_tasks_of_any_length(tokenizer, task):
    own = with_template(tokenizer, TINY_TEMPLATE)
    source, encode = Synthetic(task, own, 2000, "seed", True), Encoder(own, True)
    made = [source.next() for _ in range(8)]
    lengths = [len(encode(d).ids) for d in made]
    assert max(lengths) <= 2000 and min(lengths) > 100 and max(lengths) > 1.5 * min(lengths)
    for document in made:
        questions = [m["content"] for m in document.messages if m["role"] == "user"]
        for turn in (m["content"] for m in document.messages if m["role"] == "assistant"):
            assert turn.split(",")[0].strip() in questions[0]  # the answer stands in the document
    again = Synthetic(task, own, 2000, "seed", True)
    again.load_state_dict({"position": 5})
    assert again.next() == made[5]
    with pytest.raises(ValueError, match="needs sequences of at least"):
        Synthetic(task, own, 100, "seed", True)
    assert plain(made[0].messages).count("\nAnswer: ") >= len(made[0].messages) // 2


def test_a_long_conversation_reaches_the_length_asked_for(tokenizer):
    source = Synthetic("facts", with_template(tokenizer, TINY_TEMPLATE), 30_000, "seed", True)
    messages = source._facts(random.Random(3), 30_000)
    length = len(np.concatenate([tokenizer(m["content"])["input_ids"] for m in messages]))
    assert 27_000 < length < 30_000


def test_questions_are_asked_about_the_users_documents(tokenizer, tmp_path):
    text = " ".join(f"The heron of pond {n} stood still until the evening came." for n in range(400))
    (tmp_path / "a.txt").write_text(text)
    tokenizer = with_template(tokenizer, TINY_TEMPLATE)
    source = Synthetic(f"questions:{tmp_path}", tokenizer, 2048, "s", True)
    documents = [source.next() for _ in range(30)]
    assert sum("heron of pond" in d.messages[0]["content"] for d in documents) > 20
    lengths = [len(Encoder(tokenizer, True)(document).ids) for document in documents]
    assert max(lengths) <= 2048 and max(lengths) > 1000
    again = Synthetic(f"questions:{tmp_path}", tokenizer, 2048, "s", True)
    again.load_state_dict({"position": 7})
    assert again.next() == documents[7]
    with pytest.raises(ValueError, match="takes no path"):
        Synthetic("facts:a", tokenizer, 2048, "s", True)


def test_documents_in_order_come_once(tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(2500)))
    (tmp_path / "a.txt").write_text("first")
    expected = ["first", *(f"t{n}" for n in range(2500))]
    assert [d.text for d in reading.read_documents(str(tmp_path))] == expected
    assert reading.pool(str(tmp_path), 6) == ["first", "t0"]
