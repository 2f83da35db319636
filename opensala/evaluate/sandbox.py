"""Running programs that a model wrote: a process of its own with hardly any rights, a folder of its own, and
limits.

`confine.py` is what runs in that process and says what is taken away. Nothing of a test's expected answers
goes there, so that a program cannot pass by reading them. It knows nothing of benchmarks.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_SHOWN = 2000  # characters of an error that are kept


@dataclass(frozen=True)
class Limits:
    """Of one run: seconds of the processor (rounded up) and twice that by the clock, since a machine may be
    busy with other work; bytes of memory and of each file (what is printed included)."""

    seconds: float = 6.0
    memory: int = 4 << 30
    file_bytes: int = 64 << 20


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        ended: `ok`, `time` (stopped at the limit) or `error` (an exception, an exit code, a signal).
        output: what it printed.
        value: what the function returned, if one was called.
        error: the end of what it said on stderr.
    """

    ended: str
    output: str
    value: Any
    error: str
    protections: dict[str, bool]


def run_program(source: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run `source` as a program that reads `stdin`."""
    return _run(source, stdin, "", [], limits or Limits())


def call_function(source: str, name: str, arguments: list[Any], limits: Limits | None = None) -> Outcome:
    """Call a function of `source`, or a method of its class `Solution`, with arguments that JSON can
    carry."""
    return _run(source, "", name, arguments, limits or Limits())


@lru_cache(maxsize=1)
def unprotected() -> tuple[str, ...]:
    """What the sandbox cannot prevent on this machine, in words; empty on a recent Linux."""
    found = run_program("pass").protections
    lacks = {
        "files": "reading and writing other files (no Landlock in this kernel)",
        "calls": "network connections and new processes (no seccomp here)",
    }
    return tuple(words for name, words in lacks.items() if not found.get(name))


def _run(source: str, stdin: str, function: str, arguments: list[Any], limits: Limits) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="opensala-sandbox-", ignore_cleanup_errors=True) as name:
        outside = Path(name)  # the parent's own files; the program has the folder inside
        folder = outside / "inside"
        folder.mkdir(mode=0o700)
        outside.chmod(0o711)
        (folder / "program.py").write_text(source, encoding="utf-8", errors="replace")
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        (outside / "stdin").write_text(stdin, encoding="utf-8", errors="replace")
        ended = _wait(folder, outside, function, limits)
        return Outcome(
            ended,
            _read(outside / "stdout", limits.file_bytes),
            _json(folder / "result.json", limits.file_bytes) if function else None,
            _read(outside / "stderr", limits.file_bytes)[-_SHOWN:],
            _json(folder / "protections.json", 1000) or {},
        )


def _wait(folder: Path, outside: Path, function: str, limits: Limits) -> str:
    settings = {
        "seconds": limits.seconds,
        "memory": limits.memory,
        "file_bytes": limits.file_bytes,
        "function": function,
        "readable": _readable(),
    }
    command = [
        sys.executable,
        "-I",
        "-B",
        "-X",
        "utf8",
        str(Path(__file__).with_name("confine.py")),
        json.dumps(settings),
    ]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with (
        (outside / "stdin").open("rb") as given,
        (outside / "stdout").open("wb") as printed,
        (outside / "stderr").open("wb") as said,
    ):
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=printed,
            stderr=said,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(2 * limits.seconds)
        except subprocess.TimeoutExpired:
            return "time"
        finally:
            _kill(process)  # and what it started, where seccomp is missing
            process.wait()
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "time"
    return "ok" if code == 0 else "error"


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _readable() -> list[str]:
    """Folders without which Python does not run, and the packages beside it."""
    paths = {
        sys.prefix,
        sys.base_prefix,
        *sysconfig.get_paths().values(),
        "/usr",
        "/lib",
        "/lib64",
        "/etc/ld.so.cache",
        "/dev/urandom",
        "/dev/zero",
        "/usr/share/zoneinfo",
    }
    return sorted(os.path.realpath(p) for p in paths if os.path.exists(p))


def _read(path: Path, most: int) -> str:
    with path.open("rb") as file:
        return file.read(most).decode("utf-8", errors="replace")


def _json(path: Path, most: int) -> Any:
    """What the program left as JSON; None if there is nothing that is JSON. The program can have put anything
    there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        try:
            return json.loads(file.read(most))
        except (ValueError, RecursionError, OSError):
            return None
