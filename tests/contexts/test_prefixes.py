"""The prefix tree on disk: what was read before a restart is not read again, nothing damaged is used, and the
limit holds."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest

from opensala.contexts import Context, checks, prefixes
from opensala.contexts.prefixes import PrefixFolder
from opensala.engine import SamplingParams

from .tools import DENSE_LEN, PAGE, documents, engine, fork_process, model

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
LIMIT = 1 << 30


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 8)
    monkeypatch.setattr(prefixes, "PIECE_PAGES", 4)


def prompt(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(3, 112) for _ in range(length)]


def run(running, ids, namespace="", marks=()):
    """Tokens and log-probabilities of a prompt's continuation, and the account of the prompt."""
    request, done = running.add(ids, PARAMS, namespace=namespace, marks=marks), None
    while running.has_work:
        for event in running.step():
            done = event.completion or done
    assert done.request_id == request and done.error is None
    return (done.tokens, done.logprobs), done.reuse


class Started:
    """An engine with a folder, as long as the block lasts."""

    def __init__(self, of, path, limit=LIMIT, **changes):
        self.running = engine(of, **changes)
        self.folder = self.running.prefixes = PrefixFolder(path, self.running, limit)

    def __enter__(self):
        return self.running

    def __exit__(self, *_):
        self.folder.close()
        self.running.check_integrity()


@pytest.mark.parametrize("length", [9, PAGE, DENSE_LEN - 9, DENSE_LEN - 1, DENSE_LEN, 5 * PAGE, 333, 700])
def test_after_a_restart(length, tmp_path):
    """Found again to the last token, in the mode it was read in; the answer is the same, bit for bit."""
    of, ids = model(), prompt(0, length)
    with Started(of, tmp_path / "p") as running:
        assert run(running, ids, marks=[length])[1].reused == 0
        assert run(running, ids, marks=[length])[1].restored == 0  # found in memory: not counted
    for more in ([], prompt(1, 5), prompt(1, 100)):
        wanted, _ = run(engine(of), ids + more)
        with Started(of, tmp_path / "p") as running:
            found, reuse = run(running, ids + more)
            assert found == wanted
            same = (length + len(more) >= DENSE_LEN) == (length >= DENSE_LEN)
            if same and more and length > 8:
                assert reuse.restored == reuse.reused >= length - 1
            again, reuse = run(running, ids + more + [7])
            assert again == run(engine(of), ids + more + [7])[0] and reuse.reused >= reuse.restored


def test_texts_that_begin_alike_share_their_runs(tmp_path):
    of, shared = model(), prompt(0, 40 * PAGE + 3)
    with Started(of, tmp_path / "p") as running:
        for seed in range(1, 4):
            run(running, shared + prompt(seed, 50), marks=[len(shared)])
        folder = running.prefixes
    page, one = 2 * 2 * PAGE * 2 * 8 * 4, folder.num_bytes
    assert folder.num_texts == 4 and one < 1.6 * 50 * page + 5 * folder.num_texts * 20_000
    tokens = sum(r.segment.end_token - r.segment.first_token for r in folder._runs.values())
    assert tokens < len(shared) + 3 * (50 + PARAMS.max_tokens)
    with Started(of, tmp_path / "p") as running:
        for seed in range(1, 5):
            found, reuse = run(running, shared + prompt(seed, 50))
            assert found == run(engine(of), shared + prompt(seed, 50))[0]
            assert reuse.restored >= len(shared)
        # the shared beginning once: what is behind it was another text's answer, or in the tree by then
        assert running.prefixes.restored_tokens < 2 * len(shared)


def test_namespaces_and_modes_keep_to_themselves(tmp_path):
    of, ids = model(), prompt(0, 200)
    with Started(of, tmp_path / "p") as running:
        run(running, ids, "anna", [200])
    with Started(of, tmp_path / "p") as running:
        assert run(running, [*ids, 5], "ben")[1].reused == run(running, [*ids, 5])[1].reused == 0
        assert run(running, [*ids, 5], "anna")[1].restored == 200
    assert all("anna" not in p.read_text(errors="ignore") for p in (tmp_path / "p").iterdir())
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
    with Started(of, tmp_path / "q") as running:
        run(running, ids[:40], marks=[40])  # densely
    with Started(of, tmp_path / "q") as running:
        assert run(running, ids)[1].reused == 0  # sparsely


def test_written_piece_by_piece_while_nothing_else_is_done(tmp_path):
    """A process that ends at once, without closing, leaves what it had written."""
    of, ids = model(), prompt(0, 300)
    running = engine(of)
    folder = running.prefixes = PrefixFolder(tmp_path / "p", running, LIMIT)
    wanted, _ = run(running, ids, marks=[299])
    pieces = 0
    while folder.write_next():
        pieces += 1
        running.check_integrity()
    assert pieces >= 300 // (4 * PAGE) and not folder.write_next()
    shutil.copytree(tmp_path / "p", tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    folder.close()
    with Started(of, tmp_path / "copy") as running:
        found, reuse = run(running, ids)
        assert found == wanted and reuse.restored == reuse.reused == 299


def test_the_least_recently_used_give_way(tmp_path):
    of, texts = model(), [prompt(seed, 20 * PAGE) for seed in range(6)]
    with Started(of, tmp_path / "one") as running:
        run(running, texts[0], marks=[20 * PAGE])
        folder = running.prefixes
    one = folder.num_bytes
    with Started(of, tmp_path / "p", 4 * one) as running:
        for ids in texts[:3]:
            run(running, ids, marks=[20 * PAGE])
        while running.prefixes.write_next():
            pass
        assert running.prefixes.num_bytes <= 4 * one
    with Started(of, tmp_path / "p", 4 * one) as running:
        assert run(running, [*texts[0], 5])[1].restored == 20 * PAGE  # used again
        for ids in texts[3:5]:
            run(running, ids, marks=[20 * PAGE])
    assert sum(p.stat().st_size for p in (tmp_path / "p").glob("segment*")) <= 4 * one
    with Started(of, tmp_path / "p", 4 * one) as running:
        kept = [run(running, [*ids, 5])[1].restored for ids in texts[:5]]
    assert kept[0] == kept[3] == kept[4] == 20 * PAGE and kept[1] == 0
    with Started(of, tmp_path / "p", one // 2) as running:  # nothing fits any more
        assert running.prefixes.num_bytes <= one // 2
        assert run(running, [*texts[4], 5])[1].restored == 0
    assert len(list((tmp_path / "p").iterdir())) <= 3


def filled(of, path):
    """A folder with two texts, and what comes behind them."""
    texts = [prompt(0, 250), prompt(0, 250)[:150] + prompt(1, 90)]
    with Started(of, path) as running:
        for ids in texts:
            run(running, ids, marks=[150, len(ids) - 1])
    wanted = [run(engine(of), ids)[0] for ids in texts]
    return texts, wanted


def test_nothing_damaged_is_used(tmp_path, caplog):
    """Bytes flipped anywhere, files cut short and removed: prompts are read anew, the rest is still used."""
    of, rng = model(), random.Random(0)
    texts, wanted = filled(of, tmp_path / "p")
    files = sorted(p.name for p in (tmp_path / "p").iterdir())
    with Started(of, tmp_path / "p") as running:
        whole = [run(running, ids)[1].restored for ids in texts]
    assert min(whole) >= 150
    seen = Counter()
    for trial in range(72):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "p", copy)
        name = "index.json" if trial % 12 == 0 else rng.choice(files)
        data = bytearray((copy / name).read_bytes())
        if trial % 3 == 2:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        if trial % 11 == 10:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(data)
        caplog.clear()
        with Started(of, copy) as running:
            found = [run(running, ids) for ids in texts]
        assert [f[0] for f in found] == wanted, (trial, name)
        said = "anew" in caplog.text and str(copy / name) in caplog.text
        kept = [reuse.restored for _, reuse in found]
        missing = name == "index.json" and trial % 11 == 10
        # what was not touched, as a run behind the prompts, may be damaged unnoticed
        assert said or missing or kept == whole, (trial, name)
        seen[said] += 1
        shutil.rmtree(copy)
    assert seen[True] > 40


def test_who_may_have_the_folder(tmp_path):
    of = model()
    with Started(of, tmp_path / "p") as running:
        run(running, prompt(0, 100))
        with pytest.raises(ValueError, match="p is in use by process"):
            PrefixFolder(tmp_path / "p", engine(of), LIMIT)
    with pytest.raises(
        ValueError, match="the folder was made by another model: weights differ in .* Give ano"
    ):
        PrefixFolder(tmp_path / "p", engine(model(1)), LIMIT)
    with pytest.raises(ValueError, match="dtype is 'float32' in the folder and 'float64'"):
        PrefixFolder(tmp_path / "p", engine(model().double()), LIMIT)
    assert not (tmp_path / "p" / ".lock").exists()
    with pytest.raises(ValueError, match="the limit of .*p must be at least 1 byte, got 0"):
        PrefixFolder(tmp_path / "p", engine(of), 0)
    Context.ingest(engine(of), documents(100), tmp_path / "a.ctx").close()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "segment-a.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, said in (("a.ctx", "no folder of prefixes"), ("words", "is not empty"), ("file", "is a file")):
        with pytest.raises(ValueError, match=said):
            PrefixFolder(tmp_path / name, engine(of), LIMIT)
    assert (tmp_path / "words" / "segment-a.safetensors").read_text() == "mine"
    shutil.copytree(tmp_path / "a.ctx", tmp_path / "other")
    (tmp_path / "other" / "manifest.json").rename(tmp_path / "other" / "index.json")
    with pytest.raises(
        ValueError, match="index.json: format must be 'opensala-prefixes', got 'opensala-cont"
    ):
        PrefixFolder(tmp_path / "other", engine(of), LIMIT)


def test_another_version_is_begun_anew(tmp_path, caplog):
    of = model()
    filled(of, tmp_path / "p")
    path = tmp_path / "p" / "index.json"
    record = prefixes._checked(path, path.read_bytes())
    path.write_text(json.dumps({**record, "version": 1, "checksum": "of another kind"}))
    with Started(of, tmp_path / "p") as running:
        assert "is begun anew: version 1" in caplog.text and not running.prefixes.num_bytes
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["index.json"]


@pytest.mark.parametrize("after", range(0, 6))
def test_a_full_disk_stops_nothing_but_the_keeping(after, tmp_path, monkeypatch, caplog):
    of = model()
    texts, wanted = filled(of, tmp_path / "p")
    real, calls = os.fsync, iter(range(1000))

    def full(handle):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    running = engine(of)
    folder = running.prefixes = PrefixFolder(tmp_path / "p", running, LIMIT)
    monkeypatch.setattr(checks.os, "fsync", full)
    found = [run(running, ids + prompt(7, 50), marks=[len(ids) + 50]) for ids in texts]
    folder.close()
    assert caplog.text.count("cannot be written") == 1 and not (tmp_path / "p" / ".lock").exists()
    monkeypatch.setattr(checks.os, "fsync", real)
    running.check_integrity()
    assert all(reuse.restored for _, reuse in found)
    assert [f[0] for f in found] == [run(engine(of), ids + prompt(7, 50))[0] for ids in texts]
    with Started(of, tmp_path / "p") as running:
        found = [run(running, ids) for ids in texts]
        assert [f[0] for f in found] == wanted and all(reuse.restored for _, reuse in found)


def test_killed_at_random_moments(tmp_path):
    """SIGKILL while texts are written and give way: what is left is used, or read anew, to the same bits."""
    of, rng = model(), random.Random(3)
    texts = [prompt(seed, 260) for seed in range(3)]
    wanted = [run(engine(of), ids)[0] for ids in texts]
    with Started(of, tmp_path / "p") as running:
        run(running, texts[0], marks=[259])
        limit = int(2.2 * running.prefixes.num_bytes) or 400_000
    restored = killed = 0
    for _ in range(12):
        child = fork_process()
        if not child:
            try:
                with Started(of, tmp_path / "p", limit) as running:
                    for ids in rng.sample(texts, 3):
                        run(running, ids, marks=[259])
                        while running.prefixes.write_next():
                            pass
            finally:
                os._exit(0)
        rng.random()
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        running = engine(of)
        folder = PrefixFolder(tmp_path / "p", running, limit)  # nothing is written but by the children
        running.prefixes = folder
        assert folder.num_bytes <= limit
        for ids, right in zip(texts, wanted, strict=True):
            found, reuse = run(running, ids)
            assert found == right
            restored += reuse.restored > 0
        folder._lock.release()
    assert killed > 1 and restored > 4
