"""One process at a time in a folder; the lock goes with its process, however that ends."""

import os
import signal
import subprocess
import sys

import pytest

from opensala.runs import FolderLock
from opensala.runs.lock import LOCK_FILE

HOLD = (
    "import sys, time; from opensala.runs import FolderLock; FolderLock(sys.argv[1]); "
    "print(1, flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_and_told_who_holds_it(holder, tmp_path):
    with pytest.raises(ValueError, match=f"run is in use by process {holder.pid} on .*: wait for it to end"):
        FolderLock(tmp_path / "run")


def test_kill_9_lets_it_go(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    FolderLock(tmp_path / "run").release()


def test_two_in_one_process_and_nothing_left_behind(tmp_path):
    folder = tmp_path / "a" / "b"
    with FolderLock(folder):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
            FolderLock(folder)
        assert [p.name for p in folder.iterdir()] == [LOCK_FILE]
    assert not (tmp_path / "a").exists()
    with FolderLock(folder):
        (folder / "result").write_text("x")
    assert [p.name for p in folder.iterdir()] == ["result"]


def test_a_lock_file_taken_away_by_its_holder_is_not_held(tmp_path, monkeypatch):
    """Between opening and locking, the holder may remove the file: then a new one has its name."""
    import fcntl

    original, calls = fcntl.flock, []

    def flock(handle, flags):
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        return original(handle, flags)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    monkeypatch.undo()
    assert len(calls) == 2 and (tmp_path / LOCK_FILE).exists()
    with pytest.raises(ValueError, match="in use"):
        FolderLock(tmp_path)
    lock.release()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file: give a folder"):
        FolderLock(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be written: Not a directory; give a folder"):
        FolderLock(tmp_path / "file" / "below")
