"""Steps that are processes: their times, their limit, what they started, and the marks of those done."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from opensala.runs import done_before, mark_done, run_process


def run(tmp_path, code, **options):
    with open(tmp_path / "out", "w") as out:
        return run_process((sys.executable, "-c", code), out, **options)


def test_times_and_what_it_printed(tmp_path):
    work = "import os, time\nwhile time.process_time() < 0.3: pass\nprint(os.environ['WORD'], flush=True)"
    work += "; os._exit(3)"
    ended = run(tmp_path, work, environment={"WORD": "hello"})
    assert ended.code == 3 and (tmp_path / "out").read_text() == "hello\n"
    assert 0.3 <= ended.processor_seconds < 2 and ended.seconds >= 0.25


def test_beyond_its_limit_it_ends_with_what_it_started(tmp_path):
    child = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    start = time.monotonic()
    ended = run(tmp_path, child, limit=2.0)
    assert ended.code is None and time.monotonic() - start < 15
    started = int((tmp_path / "pid").read_text())
    for _ in range(100):  # it is no child of this process: the system takes it away when it likes
        try:
            os.kill(started, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{started}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("what it started lives on")


def test_marks(tmp_path):
    ended = run(tmp_path, "pass")
    assert done_before(tmp_path, "one", ("python", "a")) is None
    mark_done(tmp_path, "one", ("python", "a"), ended, rows=[{"x": 1}])
    assert done_before(tmp_path, "one", ("another python", "a"))["rows"] == [{"x": 1}]
    assert json.loads((tmp_path / "done" / "one.json").read_text())["seconds"] >= 0
    with pytest.raises(ValueError, match="one was done in .* by another command"):
        done_before(tmp_path, "one", ("python", "b"))
