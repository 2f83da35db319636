"""The folder of a run: what it refuses, what it leaves behind, and disks that are full or read-only."""

import errno
import os
import resource
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensala.runs import RunFolder, write_errors
from opensala.runs.folder import write_json


@dataclass
class Options:
    length: int = 1

    def as_dict(self):
        return {"length": self.length}


@contextmanager
def small_files(limit):
    """Files may not grow beyond `limit` bytes: writing fails as on a full disk, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def unprivileged():
    """Root may write anywhere: act as nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_refused_start_leaves_nothing_behind(tmp_path):
    folder = RunFolder(tmp_path / "run", Options(), False)
    with pytest.raises(ValueError, match="no such layer"), folder.held():
        assert (tmp_path / "run" / "config.json").exists()
        raise ValueError("no such layer")
    assert not (tmp_path / "run").exists()
    RunFolder(tmp_path / "run", Options(2), False).close()


def test_what_was_computed_is_kept(tmp_path):
    folder = RunFolder(tmp_path / "run", Options(), False)
    with pytest.raises(ValueError, match="nan"), folder.held():
        folder.log({"phase": "align", "step": 0})
        raise ValueError("loss is nan")
    assert (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match="length is 1 there and 2 here"):
        RunFolder(tmp_path / "run", Options(2), True)
    again = RunFolder(tmp_path / "run", Options(), True)
    assert len(again.metrics()) == 1
    again.close()


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(ValueError, match="run holds no training to resume: check its name, or omit --resume"):
        RunFolder(tmp_path / "run", Options(), True, "training")
    assert not (tmp_path / "run").exists()


def test_the_second_run_is_refused_at_its_start(tmp_path):
    first = RunFolder(tmp_path / "run", Options(), False)
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()} on "):
            RunFolder(tmp_path / "run", Options(), resume)
    first.close()
    RunFolder(tmp_path / "run", Options(), True).close()


@pytest.fixture
def open_folder():
    """A folder that everybody may read and enter (pytest's own are closed to others)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_folder_without_permission_is_one_line(open_folder):
    (open_folder / "run").mkdir(mode=0o555)
    with unprivileged():
        for name in ("run", "new"):
            with pytest.raises(
                ValueError, match=f"{name}.* cannot be written: Permission denied; give a folder"
            ):
                RunFolder(open_folder / name, Options(), False)
    assert not list((open_folder / "run").iterdir())


WRITERS = {
    "json": lambda path: write_json(path, ["x"] * 90_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(90_000)}, path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_cannot_grow_is_one_line_and_the_old_one_is_kept(tmp_path, kind):
    path = tmp_path / "state"
    write_json(path, "old")
    target = path if kind != "safetensors" else tmp_path / "other"
    with (
        pytest.raises(
            ValueError, match=r"cannot be written: .*File too large.* bytes are free there.*then go on"
        ),
        write_errors(tmp_path, "go on with --resume"),
        small_files(50_000),
    ):
        WRITERS[kind](target)
    assert path.read_text() == '"old"\n' and not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "state.partial").symlink_to("/dev/full")
    with (
        pytest.raises(ValueError, match=r"cannot be written: No space left on device; [\d,]+ bytes are free"),
        write_errors(tmp_path),
    ):
        write_json(tmp_path / "state", "a" * 90_000)


def test_other_errors_are_not_touched(tmp_path):
    with pytest.raises(BrokenPipeError), write_errors(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
