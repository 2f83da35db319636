"""A context that is not what was written is refused, naming file and field: nothing damaged is ever used."""

import json
import os
import random
import shutil
import struct
from dataclasses import asdict

import pytest

from opensala.contexts import Context, DamagedContext, checks, read_manifest
from opensala.contexts.store import unpack, verify

from .tools import PARAMS, documents, engine, model, outcome

QUESTION = "what is the code?"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A context of two segments with a turn, its files' bytes, and what it answers."""
    folder, of = tmp_path_factory.mktemp("kept") / "a.ctx", model()
    running = engine(of)
    with Context.ingest(running, documents(250), folder) as context:
        context.extend(documents(60, 1, "more.txt"))
        context.ask("who?", PARAMS, keep=True)
        context.save()
        wanted = outcome(context.ask(QUESTION, PARAMS))
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(files) == 6
    return of, folder, files, wanted


def attempt(of, folder, wanted):
    """What comes of it: the very answer, or a refusal that names a file."""
    running = engine(of)
    try:
        with Context.open(running, folder) as context:
            found = outcome(context.ask(QUESTION, PARAMS))
            said = [(d.name, d.text) for d in context.documents]
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error), error
        running.check_integrity()
        return "refused"
    assert said == [(d.name, d.text) for d in (*documents(250), *documents(60, 1, "more.txt"))]
    assert found == wanted, "garbage was used"
    return "used"


def test_a_thousand_flipped_bytes(kept, tmp_path):
    """All are found by `verify`; of those in use, every one before it is used."""
    of, folder, files, wanted = kept
    rng, places = random.Random(0), [(n, i) for n, data in sorted(files.items()) for i in range(len(data))]
    copy = tmp_path / "a.ctx"
    shutil.copytree(folder, copy)
    refused = 0
    for trial, (name, place) in enumerate(rng.sample(places, 1000)):
        data = bytearray(files[name])
        data[place] ^= 1 << rng.randrange(8) if trial % 2 else rng.randrange(1, 256)
        (copy / name).write_bytes(data)
        with pytest.raises(ValueError) as found:
            verify(copy)
        assert str(copy) in str(found.value)
        if trial % 10 == 0:
            refused += attempt(of, copy, wanted) == "refused"
        (copy / name).write_bytes(files[name])
    assert refused > 25
    assert attempt(of, copy, wanted) == "used" and verify(copy) == sum(map(len, files.values()))


def test_a_hundred_truncations(kept, tmp_path):
    of, folder, files, wanted = kept
    rng, copy = random.Random(1), tmp_path / "a.ctx"
    shutil.copytree(folder, copy)
    for trial in range(100):
        name = rng.choice(sorted(files))
        data = files[name]
        (copy / name).write_bytes(data[: rng.randrange(len(data))] if trial % 10 else data + b"\0")
        with pytest.raises(ValueError, match=str(copy)):
            verify(copy)
        if trial % 3 == 0 and not name.startswith("text"):
            assert attempt(of, copy, wanted) == "refused"
        (copy / name).write_bytes(files[name])


def test_flipped_while_it_is_open(kept, tmp_path):
    """What is read later is checked later; what was truncated under us is an error, not a crash."""
    of, folder, files, wanted = kept
    for change in ("flip", "truncate"):
        copy = tmp_path / change
        shutil.copytree(folder, copy)
        running = engine(of)
        with Context.open(running, copy) as context:
            assert running.storage.backing.num_absent
            for name in files:
                if name.startswith("segment"):
                    if change == "flip":
                        (header,) = struct.unpack("<Q", files[name][:8])
                        places = json.loads(files[name][8 : 8 + header])["kv.0"]["data_offsets"]
                        first = 8 + header + places[0]
                        with open(copy / name, "r+b") as file:
                            for place in range(first, len(files[name]), 97):
                                file.seek(place)
                                file.write(bytes([files[name][place] ^ 255]))
                    else:
                        os.truncate(copy / name, 100)
            said = "page .* checksum" if change == "flip" else "the length"
            with pytest.raises(DamagedContext, match=said):
                context.ask(QUESTION, PARAMS)
            running.check_integrity()
        running.check_integrity()


def test_a_folder_that_vanishes_while_it_is_open(kept, tmp_path):
    of, folder, _, wanted = kept
    copy = tmp_path / "a.ctx"
    shutil.copytree(folder, copy)
    running = engine(of)
    with Context.open(running, copy) as context:
        shutil.rmtree(copy)
        assert outcome(context.ask(QUESTION, PARAMS)) == wanted


def rewritten(folder, **changes):
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, **changes}))


def forged(folder, **changes):
    """A manifest that somebody made, checksum and all."""
    record = {**json.loads((folder / "manifest.json").read_text()), **changes}
    del record["checksum"]
    lines = json.dumps(record, indent=1)
    text = f'{lines[:-2]},\n "checksum": "{checks.checksum(lines.encode()).hex()}"\n}}\n'
    (folder / "manifest.json").write_text(text)


def test_what_is_no_context(kept, tmp_path):
    of, folder, files, _ = kept
    running, copy = engine(of), tmp_path / "a.ctx"

    def refused(path, *words):
        for use in (lambda: Context.open(running, path), lambda: verify(path)):
            with pytest.raises(ValueError) as found:
                use()
            assert str(path) in str(found.value) and all(w in str(found.value) for w in words), found.value

    refused(tmp_path / "nowhere", "there is no such context")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "a file, no context")
    (tmp_path / "other").mkdir()
    refused(tmp_path / "other", "no context: it has no manifest.json")
    for text in ("[]", "{}", '{"format": "mlx-cache", "version": 1}'):
        (tmp_path / "other" / "manifest.json").write_text(text)
        refused(tmp_path / "other", "format must be 'opensala-context'")
    (tmp_path / "other" / "manifest.json").write_bytes(b"\xff\xfe")
    refused(tmp_path / "other", "expected JSON")
    shutil.copytree(folder, copy)
    rewritten(copy, version=1)
    refused(copy, "version must be 2, got 1", "ingest the documents again")
    rewritten(copy, version=2, planned=12)
    refused(copy, "the manifest is damaged")
    (copy / "manifest.json").write_bytes(files["manifest.json"])
    name = next(n for n in files if n.startswith("segment"))
    for made_up in (
        {"segments": [{}]},
        {"segments": 3},
        {"page_size": 0},
        {"page_size": "x"},
        {"turns": [[]]},
    ):
        forged(copy, **made_up)
        refused(copy, "manifest.json")
    manifest = read_manifest(folder)
    for key, value in (("file", "../x"), ("end_token", "x"), ("pages", 1), ("size", 12), ("first_page", 7)):
        segments = [{**asdict(s), key: value} for s in manifest.segments]
        forged(copy, segments=segments)
        refused(copy)
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").mkdir()
    refused(copy, "the manifest cannot be read")
    (copy / "manifest.json").rmdir()
    (copy / "manifest.json").write_bytes(files["manifest.json"])
    (copy / name).unlink()
    refused(copy, name, "found none")


def test_another_model_is_refused_by_name(kept):
    of, folder, _, wanted = kept

    def refused(other, *words):
        with pytest.raises(ValueError, match="made by another model") as found:
            Context.open(other, folder)
        assert all(w in str(found.value) for w in words), found.value
        other.check_integrity()

    refused(engine(model(1)), "weights differ in", "tensors, the first of them")
    one = model()
    one.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-6
    refused(engine(one), "weights differ in 1 of", "layers.1.mlp.down_proj.weight")
    sparse = {**of.config.sparse_config, "topk": 6}
    refused(engine(model(sparse_config=sparse)), "sparse_config.topk is 5 in the context and 6 in the model")
    refused(engine(model(attention_mode="sparse")), "config.attention_mode is 'auto'")
    refused(engine(model().double()), "dtype is 'float32' in the context and 'float64'")
    other = engine(of)
    other.tokenizer.add_tokens(["zebra"])
    refused(other, "tokenizer is")
    other = engine(of)
    other.tokenizer.chat_template = "{{ messages }}"
    refused(other, "chat_template is None")
    assert attempt(model(), folder, wanted) == "used"


def test_no_longer_than_memory(kept):
    of, folder, _, _ = kept
    small = engine(of, max_cached_tokens=200)
    tokens = read_manifest(folder).tokens
    with pytest.raises(ValueError, match=f"{tokens} tokens need .* pages"):
        Context.open(small, folder)
    small.check_integrity()
    small = engine(of, max_cached_tokens=600)
    small.add(list(range(3, 90)) * 4, PARAMS)
    with pytest.raises(ValueError, match="a request of up to 360 tokens is under way"):
        Context.open(small, folder)
    while small.has_work:
        small.step()
    with Context.open(small, folder) as context:
        with pytest.raises(ValueError, match="do not fit beside the open contexts, which leave room for"):
            small.add(list(range(3, 90)) * 5, PARAMS)
        assert context.ask(QUESTION, PARAMS).reused_tokens == tokens
        small.check_integrity()
    small.generate([list(range(3, 90)) * 5], PARAMS)
    few = engine(of, max_running=1, max_snapshots=0)
    opened = [Context.open(few, folder)]
    with pytest.raises(ValueError, match="contexts are open, and the 4 state slots hold no more"):
        for seed in range(4):
            opened.append(Context.ingest(few, documents(60, seed + 5)))
    assert len(opened) > 1
    for context in opened:
        context.close()
    few.check_integrity()


def test_an_imported_file_is_checked(kept, tmp_path):
    from opensala.contexts.store import export

    of, folder, files, wanted = kept
    size = export(folder, tmp_path / "one.tar")
    assert size == (tmp_path / "one.tar").stat().st_size
    data = (tmp_path / "one.tar").read_bytes()
    unpack(tmp_path / "one.tar", tmp_path / "b.ctx")
    assert {p.name: p.read_bytes() for p in (tmp_path / "b.ctx").iterdir()} == files
    assert attempt(of, tmp_path / "b.ctx", wanted) == "used"
    rng = random.Random(2)
    for trial in range(60):
        changed = bytearray(data)
        if trial % 2:
            del changed[rng.randrange(len(changed) - 12_000) :]
        else:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.tar").write_bytes(changed)
        try:
            unpack(tmp_path / "bad.tar", tmp_path / "c.ctx")
        except ValueError as error:
            assert "bad.tar" in str(error) and "partial" not in str(error)
            assert not (tmp_path / "c.ctx").exists() and not (tmp_path / "c.ctx.partial").exists()
        else:  # it was in the tar's own padding or times
            assert trial % 2 == 0
            assert {p.name: p.read_bytes() for p in (tmp_path / "c.ctx").iterdir()} == files
            shutil.rmtree(tmp_path / "c.ctx")
    with pytest.raises(ValueError, match="one.tar exists"):
        export(folder, tmp_path / "one.tar")
    with pytest.raises(ValueError, match="b.ctx is not empty"):
        unpack(tmp_path / "one.tar", tmp_path / "b.ctx")
    (tmp_path / "words").write_text("no tar at all" * 1000)
    with pytest.raises(ValueError, match="words"):
        unpack(tmp_path / "words", tmp_path / "d.ctx")
