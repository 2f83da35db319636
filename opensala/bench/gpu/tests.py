"""The GPU's own test files, one after the other, each in a process of its own, their log on disk as it
grows."""

import re
import subprocess
import sys
import time
from pathlib import Path

from .steps import Context, Step

ROOT = Path(__file__).parents[3]
MARK = "large_memory"  # tests that want tens of GiB: never beside another, and only when they are asked for
GENEROUS = 1.6  # times an equal share of the time: most files take less
LEAST = 15.0  # seconds without which a file is not begun


def files() -> list[Path]:
    """Test files that say by their name, and at their head, that they want a GPU."""
    named = sorted((ROOT / "tests").rglob("test_*_gpu.py"))
    found = [path for path in named if "needs a GPU" in path.read_text(encoding="utf-8")]
    return sorted(found, key=lambda path: path.parent.name != "ops")  # the ops before what stands on them


def steps() -> list[Step]:
    found = files()
    return [_step(path, "tests", f"not {MARK}", len(found) - n) for n, path in enumerate(found)]


def large_steps() -> list[Step]:
    """The tests that want most of the memory."""
    return [_step(path, "large", MARK) for path in files()]


def _step(path: Path, group: str, mark: str, left: int = 1) -> Step:
    name = f"{path.name}, {group}"
    share = min(1.0, GENEROUS / left)
    return Step(name, group, LEAST, lambda context: run_file(context, path, mark, share))


def run_file(context: Context, path: Path, mark: str, share: float = 1.0) -> None:
    """Run one file within this share of what its group has left.

    Raises:
        RuntimeError: a test failed, or time was over; what passed until then is in the message.
    """
    log = context.file("tests.log")
    relative = str(path.relative_to(ROOT))
    command = [sys.executable, "-m", "pytest", relative, "-m", mark, "-v", "--durations=8"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "--color=no"]
    limit = min(context.seconds_left * share, 1e6)
    with log.open("a") as file:
        file.write(f"$ {' '.join(command[1:])}\n")
        file.flush()
        begin, start = log.stat().st_size, time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    with log.open("rb") as file_:
        file_.seek(begin)
        output = file_.read().decode(errors="replace")
    verdict = _verdict(output, code, time.perf_counter() - start)
    context.report.write({"event": "tests", "file": relative, "verdict": verdict, "ok": code in (0, 5)})
    context.report.say(f"  {relative}: {verdict}")
    if code not in (0, 5):  # 5: no test has the mark
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
        raise RuntimeError(f"{relative}: {verdict}; {', '.join(f.split('::')[-1] for f in failed[:8])}")


def _verdict(output: str, code: int | None, seconds: float) -> str:
    if code is not None:
        return f"{(output.strip().splitlines() or ['no output'])[-1].strip('= ')}"
    passed, failed = (len(re.findall(rf"^\S+::.* {word}\b", output, re.M)) for word in ("PASSED", "FAILED"))
    running = re.findall(r"^(\S+::\S.*?)\s*$", output, re.M)
    last = running[-1].split("::")[-1] if running else "the first one"
    return f"stopped after {seconds:.0f} s: {passed} passed, {failed} failed, the last line was {last}"
