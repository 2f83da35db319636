"""Small segments become large ones: to the same bits, whatever interrupts it; turns can still be undone."""

import errno
import os
import shutil

import pytest

from opensala.contexts import Context, DamagedContext, checks, merge, read_manifest
from opensala.contexts.segment import SegmentFile
from opensala.contexts.store import compact, verify

from .files import content
from .tools import PARAMS, documents, engine, fork_process, model, outcome

ADDED = [documents(45, seed, f"{seed}.txt") for seed in range(1, 61)]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(merge, "FULL_PAGES", 40)
    monkeypatch.setattr(merge.merge_if_worth_it, "__defaults__", (40,))


def extended(of, path, times, merged, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merge, "SURPLUS", merge.SURPLUS if merged else 1000)
        with Context.ingest(engine(of), documents(300), path) as kept:
            most = 0
            for docs in ADDED[:times]:
                kept.extend(docs)
                most = max(most, len(kept.manifest.segments))
    return most


def test_extended_many_times(tmp_path, monkeypatch):
    of = model()
    assert extended(of, tmp_path / "many.ctx", 60, False, monkeypatch) == 61
    most = extended(of, tmp_path / "few.ctx", 60, True, monkeypatch)
    pages = read_manifest(tmp_path / "few.ctx").segments[-1].end_page
    assert most <= 2 * pages / 40 + merge.YOUNGEST + merge.SURPLUS + 2 < 30
    segments = len(list((tmp_path / "few.ctx").glob("segment*")))
    assert segments == len(read_manifest(tmp_path / "few.ctx").segments) <= most
    assert content(tmp_path / "few.ctx") == content(tmp_path / "many.ctx")
    before, after = compact(tmp_path / "many.ctx")
    assert before == 61 and after <= pages / 20 + 1
    assert verify(tmp_path / "many.ctx") and compact(tmp_path / "many.ctx") == (after, after)
    assert content(tmp_path / "few.ctx") == content(tmp_path / "many.ctx")
    answers = []
    for name in ("few.ctx", "many.ctx"):
        running = engine(of)
        with Context.open(running, tmp_path / name) as kept:
            answers.append(outcome(found := kept.ask("who?", PARAMS)))
            assert found.reused_tokens == len(kept.tokens)
        running.check_integrity()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("compacted", [False, True])
def test_turns_are_undone_without_reading_again(compacted, tmp_path):
    """Reopened, the last turns come back from disk; all of them from the end of the documents."""
    of = model()
    with Context.ingest(engine(of), documents(300), tmp_path / "a.ctx") as kept:
        document, marks, said = len(kept.tokens), [], []
        for n in range(24):
            marks.append(len(kept.tokens))
            said.append(outcome(kept.ask(f"who is number {n}?", PARAMS, keep=True)))
            kept.save()
    assert len(read_manifest(tmp_path / "a.ctx").segments) <= 2 + merge.YOUNGEST + merge.SURPLUS
    if compacted:
        compact(tmp_path / "a.ctx")
    for back in (24,) if compacted else (1, 7, 24):
        running = engine(of)
        with Context.open(running, tmp_path / "a.ctx") as kept:
            kept.undo(back)
            place = 24 - back
            found = kept.ask(f"who is number {place}?", PARAMS)
            assert outcome(found) == said[place] and found.reused_tokens == marks[place]
            assert marks[0] == document
        running.check_integrity()


def stopped_at(number, error, path):
    """Compact, but for the flush of this number."""
    real, calls = os.fsync, iter(range(1000))

    def flush(handle):
        if next(calls) == number:
            if error is None:
                os._exit(7)  # as a kill: nothing is cleaned up
            raise OSError(error, os.strerror(error))
        return real(handle)

    checks.os.fsync = flush
    try:
        compact(path)
    finally:
        checks.os.fsync = real


@pytest.mark.parametrize("error", [None, errno.ENOSPC])
def test_interrupted_at_any_flush(error, tmp_path, monkeypatch):
    of, source = model(), tmp_path / "a.ctx"
    extended(of, source, 20, False, monkeypatch)
    wanted, stops = content(source), 0
    for number in range(40):
        path = tmp_path / "copy.ctx"
        shutil.copytree(source, path)
        child = fork_process()
        if not child:
            try:
                stopped_at(number, error, path)
            except ValueError as refused:
                os._exit(7 if "cannot be written" in str(refused) else 9)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 7)
        assert verify(path) and content(path) == wanted
        before, after = compact(path)  # as a second try; what was left is removed
        assert after < 21 and content(path) == wanted
        named = {s.file for s in read_manifest(path).segments}
        assert {p.name for p in path.glob("segment*")} == named
        shutil.rmtree(path)
        if not code:
            break
        stops += 1
    assert stops >= 4 and not code


def test_nothing_damaged_gets_into_a_merged_segment(tmp_path, monkeypatch, caplog):
    of, path = model(), tmp_path / "a.ctx"
    extended(of, path, 20, False, monkeypatch)
    known = read_manifest(path).segments[5]
    file, name = SegmentFile(path / known.file, known), known.file
    place, _ = file._page_place(0, 1)  # the last page would be that of the next segment
    assert known.pages > 2
    data = bytearray((path / name).read_bytes())
    data[place] ^= 1
    (path / name).write_bytes(data)
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(DamagedContext, match=name):
        compact(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == files
    running = engine(of)
    with Context.open(running, path, write=True) as kept:
        try:
            kept.extend(ADDED[30])
            assert "segments stay as they are" in caplog.text and name in caplog.text
        except DamagedContext as error:  # the page was read for the extension itself
            assert name in str(error)
    with Context.open(engine(of), path, write=True), pytest.raises(ValueError, match="in use by process"):
        compact(path)


def test_opened_while_another_process_merges(tmp_path, monkeypatch):
    """Between the reader's look at the manifest and at the files these are replaced: it looks again."""
    of, path = model(), tmp_path / "a.ctx"
    extended(of, path, 20, False, monkeypatch)
    from opensala.contexts import context

    real, calls = context.load, iter(range(10))

    def load(*arguments, **named):
        if next(calls) == 0:
            compact(path)
        return real(*arguments, **named)

    monkeypatch.setattr(context, "load", load)
    with Context.open(engine(of), path) as kept:
        assert outcome(kept.ask("who?", PARAMS))
    assert next(calls) == 2
