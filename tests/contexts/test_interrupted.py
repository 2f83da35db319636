"""Interruptions, full disks, other processes: what was saved before stays good, and reading goes on from
there."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from opensala.contexts import Context, checks, context, read_manifest
from opensala.contexts.store import fork, remove, verify
from opensala.engine import Engine

from .files import content
from .tools import PARAMS, documents, engine, fork_process, model, outcome

ROOT = Path(__file__).parents[2]


def test_killed_at_random_moments():
    """Ten times here; `python -m tests.contexts.kill 50` for more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.contexts.kill", "10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "10 rounds" in done.stdout


@pytest.mark.parametrize("step", [1, 9, 10, 25, 40])
def test_ctrl_c_leaves_what_was_read(step, tmp_path, monkeypatch):
    of, docs, path = model(), documents(2200), tmp_path / "a.ctx"
    monkeypatch.setattr(context, "SEGMENT_PAGES", 30)
    real, steps = Engine.step, iter(range(1, 1000))

    def interrupted(self):
        if next(steps) == step:
            raise KeyboardInterrupt
        return real(self)

    running = engine(of)
    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Context.ingest(running, docs, path)
    monkeypatch.setattr(Engine, "step", real)
    running.check_integrity()
    assert read_manifest(path).tokens == 50 * (step - 1) and verify(path)
    assert not (path / ".lock").exists()
    with Context.open(running, path) as kept:
        found = kept.ask("who?", PARAMS)
        assert "were read for this answer" in " ".join(found.notes) and not kept.is_whole
    fresh = engine(of)
    with Context.ingest(fresh, docs, path) as kept:
        assert kept.is_whole and outcome(kept.ask("who?", PARAMS)) == outcome(found)
    again = Context.ingest(engine(of), docs, path)  # nothing is left to do
    again.close()
    with pytest.raises(ValueError, match="a context of other documents is there"):
        Context.ingest(engine(of), documents(2200, 3), path)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_keeps_the_old_one(after, number, tmp_path, monkeypatch):
    """The disk refuses one of an extension's flushes."""
    of, path = model(), tmp_path / "a.ctx"
    Context.ingest(engine(of), documents(300), path).close()
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    monkeypatch.setattr(context, "SEGMENT_PAGES", 4)
    real, calls = os.fsync, iter(range(1000))

    def full(handle):
        if next(calls) == after:
            raise OSError(number, os.strerror(number))
        return real(handle)

    running = engine(of)
    kept = Context.open(running, path, write=True)
    monkeypatch.setattr(checks.os, "fsync", full)
    with pytest.raises(ValueError, match="a.ctx cannot be written: .*"):
        kept.extend(documents(400, 1, "more.txt"))
    monkeypatch.setattr(checks.os, "fsync", real)
    kept.close()
    running.check_integrity()
    assert verify(path)
    now = {p.name: p.read_bytes() for p in path.iterdir()}
    assert not [name for name in now if name.endswith(".partial")]
    if len(read_manifest(path).texts) == 1:
        assert all(now[name] == data for name, data in before.items())
    with Context.open(running, path, write=True) as kept:
        if len(kept.documents) == 1 or not kept.is_whole:
            kept.extend(documents(400, 1, "more.txt"))
        wanted = Context.ingest(engine(of), documents(300))
        wanted.extend(documents(400, 1, "more.txt"))
        assert outcome(kept.ask("who?", PARAMS)) == outcome(wanted.ask("who?", PARAMS))


def test_two_processes_and_one_context(tmp_path):
    of, path = model(), tmp_path / "a.ctx"
    first = Context.ingest(engine(of), documents(300), path)
    for write in (
        lambda: Context.open(engine(of), path, write=True),
        lambda: Context.ingest(engine(of), documents(300), path),
        lambda: remove(path),
    ):
        with pytest.raises(ValueError, match="a.ctx is in use by process"):
            write()
    reader = Context.open(engine(of), path)  # reading is free
    wanted = outcome(reader.ask("who?", PARAMS))
    with pytest.raises(ValueError, match="a.ctx is in use by process"):
        reader.extend(documents(40, 1))
    first.extend(documents(40, 1, "more.txt"))
    first.close()
    assert outcome(reader.ask("who?", PARAMS)) == wanted
    with pytest.raises(ValueError, match="another process has changed the context"):
        reader.extend(documents(40, 1))
    assert remove(path) > 0 and not path.exists()
    assert outcome(reader.ask("who?", PARAMS)) == wanted


def in_a_child(work):
    """Run `work` in a forked process, whose limits and rights it may change; what it raised, or ""."""
    reading, writing = os.pipe()
    child = fork_process()
    if not child:
        said = ""
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


@pytest.mark.parametrize("limit", [1, 5_000, 40_000, 90_000])
def test_a_file_that_the_disk_does_not_take(limit, tmp_path):
    """A real refusal in the middle of a write (a limit on the size of files): while saving and extending."""
    of, path = model(), tmp_path / "a.ctx"
    Context.ingest(engine(of), documents(300), path).close()
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def limited(work):
        def run():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()

        return in_a_child(run)

    kept = Context.open(engine(of), path, write=True)
    said = limited(lambda: kept.extend(documents(900, 1, "more.txt")))
    kept.close()
    assert said.startswith("ValueError: ") and "cannot be written: File too large" in said, said
    assert "bytes are free there. What was saved before is unharmed" in said
    now = {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".lock"}
    assert not [name for name in now if name.endswith(".partial")] and verify(path)
    if len(read_manifest(path).texts) == 1:
        assert all(now[name] == data for name, data in before.items())
    new = Context.ingest(engine(of), documents(900))
    said = limited(lambda: new.save(tmp_path / "b.ctx"))
    assert "b.ctx" in said and "cannot be written: File too large" in said
    assert not (tmp_path / "b.ctx").exists() or not list((tmp_path / "b.ctx").glob("*.partial"))
    new.save(tmp_path / "c.ctx")
    assert verify(tmp_path / "c.ctx")


def test_read_only_media(monkeypatch):
    """As a user who may only read, and on a file system that says so itself."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        of, path = model(), Path(name) / "a.ctx"
        Context.ingest(engine(of), documents(300), path).close()
        Path(name).chmod(0o755)
        path.chmod(0o555)

        def work():
            if os.geteuid() == 0:  # nothing is read-only to root
                os.setgid(65534)
                os.setuid(65534)
            with Context.open(engine(of), path) as kept:
                assert kept.ask("who?", PARAMS).reused_tokens == len(kept.tokens)
                kept.extend(documents(40, 1))

        assert in_a_child(work).startswith(f"ValueError: {path}/.lock cannot be written: Permission denied")
        path.chmod(0o755)
        with Context.open(engine(of), path) as kept:
            real = os.open

            def refused(file, flags, *mode, **named):
                if flags & os.O_CREAT:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
                return real(file, flags, *mode, **named)

            monkeypatch.setattr(os, "open", refused)
            with pytest.raises(ValueError, match="a.ctx/.lock cannot be written: Read-only file system"):
                kept.extend(documents(40, 1))
            monkeypatch.undo()
        assert verify(path)


def test_half_written(tmp_path):
    """What a process leaves that ends before its first manifest, and in the middle of a file."""
    of, path = model(), tmp_path / "a.ctx"
    Context.ingest(engine(of), documents(300), path).close()
    wanted, whole = content(path), (path / "manifest.json").read_bytes()
    (path / "segment-00002.safetensors.partial").write_bytes(b"half")
    (path / "manifest.json.partial").write_bytes(whole[:100])
    with Context.open(engine(of), path) as kept:  # readers let it be
        assert kept.ask("who?", PARAMS).reused_tokens == len(kept.tokens)
    Context.open(engine(of), path, write=True).close()  # a writer removes it
    assert content(path) == wanted and not list(path.glob("*.partial"))
    (path / "manifest.json").unlink()
    for use in (
        lambda: Context.open(engine(of), path),
        lambda: verify(path),
        lambda: fork(path, tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match="a.ctx: no context: it has no manifest.json"):
            use()
    Context.ingest(engine(of), documents(300), path).close()  # begun anew, over what was left
    assert content(path) == wanted


def test_folders_that_hold_something_else(tmp_path):
    of = model()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    Context.ingest(engine(of), documents(30), tmp_path / "a.ctx").close()
    for path, said in (("words", "is not empty"), ("file", "is a file"), ("a.ctx", "not empty")):
        with pytest.raises(ValueError, match=said):
            fork(tmp_path / "a.ctx", tmp_path / path)
        with pytest.raises(ValueError, match=said), Context.ingest(engine(of), documents(20)) as kept:
            kept.save(tmp_path / path)
    assert sorted(p.name for p in (tmp_path / "words").iterdir()) == ["a.txt"]
    fork(tmp_path / "a.ctx", tmp_path / "b.ctx")
    shared = [p for p in (tmp_path / "b.ctx").iterdir() if p.stat().st_nlink == 2]
    assert len(shared) == 2 and remove(tmp_path / "a.ctx")
    assert verify(tmp_path / "b.ctx")
