"""Programs nobody has read: they compute, and can do nothing else; what they try instead ends them, not
us."""

import os
import sys
import time
from pathlib import Path

import pytest

from opensala.evaluate.sandbox import Limits, call_function, run_program, unprotected

LINUX = pytest.mark.skipif(bool(unprotected()), reason="this kernel lacks Landlock or seccomp")


def test_programs_compute():
    outcome = run_program("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "1 2\n39\n")
    assert (outcome.ended, outcome.output) == ("ok", "42\n")
    assert (
        run_program(
            "import threading\nt = threading.Thread(target=lambda: print('done'))\nt.start()\nt.join()"
        ).output
        == "done\n"
    )
    assert run_program("open('mine', 'w').write('x' * 9)\nprint(len(open('mine').read()))").output == "9\n"
    assert (
        run_program(
            "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\nprint('same')"
        ).output
        == "same\n"
    )
    deep = run_program("def f(n):\n    return n and f(n - 1)\nprint(f(20000))")
    assert deep.output == "0\n", deep.error


def test_functions_are_called():
    source = "class Solution:\n    def both(self, a, b):\n        print('debugging')\n        return a, b\n"
    outcome = call_function(source, "both", [[1, "é"], None])
    assert (outcome.ended, outcome.value) == ("ok", [[1, "é"], None])
    assert call_function("def twice(x): return 2 * x", "twice", [21]).value == 42
    assert call_function("def twice(x): return {1, 2}", "twice", [21]).ended == "error"
    assert call_function("x = 1", "twice", [21]).ended == "error"


def test_errors_are_told():
    outcome = run_program("print('before', flush=True)\nraise RuntimeError('no idea')")
    assert (outcome.ended, outcome.output) == ("error", "before\n") and outcome.error.endswith(
        "RuntimeError: no idea\n"
    )
    assert (
        run_program("def").ended
        == run_program("import sys; sys.exit(3)").ended
        == run_program("import os; os.abort()").ended
        == "error"
    )
    assert run_program("import ctypes; ctypes.string_at(0)").ended == "error"
    assert run_program("import sys; sys.exit(0)").ended == "ok"


def test_time_memory_and_output_have_limits():
    start = time.monotonic()
    assert run_program("while True: pass", limits=Limits(0.5)).ended == "time"
    assert run_program("import time; time.sleep(60)", limits=Limits(0.5)).ended == "time"
    assert time.monotonic() - start < 10
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_program(stubborn, limits=Limits(0.9)).ended == "time"
    hog = run_program("x = bytearray(2 << 30)\nprint(len(x))", limits=Limits(memory=1 << 30))
    assert hog.ended == "error" and "MemoryError" in hog.error
    flood = run_program("while True: print('x' * 100_000)", limits=Limits(file_bytes=1 << 20))
    assert flood.ended == "error" and len(flood.output) <= 1 << 20 and "File too large" in flood.error
    raised = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\nopen('big', "
        "'wb').write(bytes(2 << 20))"
    )
    assert run_program(raised, limits=Limits(file_bytes=1 << 20)).ended == "error"


@LINUX
@pytest.mark.parametrize(
    "attempt",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
        "open('OUTSIDE', 'w')",
        "import os\nos.remove('OUTSIDE')",
        "import os\nos.rename('OUTSIDE', 'mine')",
        "import os\nos.chmod('OUTSIDE', 0)",
        "open('OUTSIDE').read()",
        "open('/etc/passwd').read()",
        "import os\nos.listdir('/proc')",
        "import os\nos.listdir('..')",
        "import os\nos.kill(os.getppid(), 9)",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        "import ctypes\nassert ctypes.CDLL(None).syscall(234, os.getppid(), os.getppid(), 9) == 0".replace(
            "import", "import os,", 1
        ),
        "import os\nos.setuid(0)\nos.chown('.', 0, 0)",
        "import os\nos.symlink('/etc', 'way')\nopen('way/passwd')",
    ],
)
def test_nothing_else_is_possible(attempt, tmp_path):
    import socket

    outside = tmp_path / "kept"
    outside.write_text("kept")
    outside.chmod(0o666)
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = (
            attempt.replace("OUTSIDE", str(outside)).replace("PORT", str(server.getsockname()[1]))
            + "\nprint('reached')"
        )
        outcome = run_program(source, limits=Limits(5))
    assert outcome.ended == "error" and "reached" not in outcome.output, outcome
    assert outside.read_text() == "kept" and outside.stat().st_mode & 0o777 == 0o666


@LINUX
def test_a_thread_bomb_ends_itself():
    bomb = (
        "import threading, time\nthreading.stack_size(32768)\nwhile True: "
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    outcome = run_program(bomb, limits=Limits(10))
    assert outcome.ended == "error" and "can't start new thread" in outcome.error


def test_traces_are_removed_and_links_not_followed(tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('"secret"')
    outcome = call_function(
        f"import os\ndef f():\n    os.symlink({str(secret)!r}, 'result.json')\n    os._exit(0)", "f", []
    )
    assert outcome.value is None
    where = Path(run_program("import os; print(os.getcwd())").output.strip())
    assert where.name == "inside" and not where.parent.exists()
    assert (
        call_function(
            "import os\ndef f():\n    open('result.json', 'w').write('[' * 100000)\n    os._exit(0)", "f", []
        ).value
        is None
    )


def test_nothing_of_ours_is_passed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hidden")
    names = run_program("import os; print(sorted(os.environ))").output
    assert "HF_TOKEN" not in names and "HOME" in names
    assert os.environ["HF_TOKEN"] == "hidden" and sys.executable
