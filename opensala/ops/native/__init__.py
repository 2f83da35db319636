"""The compiled CPU kernels: built once for this machine's processor at first use, then loaded from a cache
folder.

The sources need a C++17 compiler with vector extensions (g++ 12 or clang 15 and later) and nothing else: they
take raw pointers and know no torch, so that they compile in seconds and outlive an upgrade of torch. OpenMP's
threads are shared with torch, whose own libgomp is already in the process. Without a compiler the PyTorch
forms run instead, and `backends` says so.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("opensala")

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-Wno-psabi",
)
CACHE_VARIABLE = "OPENSALA_CACHE"


@dataclass(frozen=True)
class Library:
    """The loaded kernels, or the reason why there are none."""

    handle: ctypes.CDLL | None
    reason: str | None

    def call(self, name: str, *arguments: object) -> None:
        """Call an exported function; int -> int64, float -> float, None or address (ctypes.c_void_p) ->
        pointer."""
        assert self.handle is not None, "the choice of backend asks for the reason first"
        getattr(self.handle, name)(*(_as_c(x) for x in arguments))


def _as_c(x: object) -> object:
    if isinstance(x, int):
        return ctypes.c_int64(x)
    return ctypes.c_float(x) if isinstance(x, float) else x


@functools.cache
def library() -> Library:
    """The kernels, compiled if this machine has not done so yet; loaded once a process."""
    compiler = find_compiler()
    if compiler is None:
        return Library(None, "no C++ compiler was found (g++ or clang++; the variable CXX names another)")
    try:
        return Library(ctypes.CDLL(str(build(compiler))), None)
    except subprocess.CalledProcessError as error:
        return Library(None, f"{compiler} could not compile the kernels: {_last_lines(error.stderr)}")
    except OSError as error:
        return Library(None, f"the compiled kernels could not be stored or loaded: {error}")


def find_compiler() -> str | None:
    """Path of the C++ compiler: the variable CXX if it is set, else the first of g++, clang++, c++ on the
    path."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def build(compiler: str) -> Path:
    """Compile the sources unless the cache holds them for this compiler and processor; the path of the
    library."""
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.cpp"))
    key = hashlib.sha256()
    for part in (*sorted(folder.glob("*.h")), *sources):
        key.update(part.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key.update("\n".join([compiler, version, *FLAGS, _processor()]).encode())
    target = cache_folder() / f"kernels-{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    logger.info("compiling the CPU kernels with %s (once; some seconds) into %s", compiler, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may come here at once: each compiles to a name of its own, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=target.parent) as work, ThreadPoolExecutor(os.cpu_count()) as pool:

        def run(arguments: list[str]) -> None:
            subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, text=True, check=True)

        objects = [str(Path(work) / f"{source.stem}.o") for source in sources]
        list(
            pool.map(
                run, (["-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True))
            )
        )
        run(["-shared", *objects, "-o", str(Path(work) / "kernels.so")])
        (Path(work) / "kernels.so").rename(target)
    return target


def cache_folder() -> Path:
    """Where compiled kernels are kept: OPENSALA_CACHE, or `opensala` in the user's cache folder."""
    asked = os.environ.get(CACHE_VARIABLE)
    return (
        Path(asked)
        if asked
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensala"
    )


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        next((line for line in lines if line.startswith(key)), "")
        for key in ("model name", "flags", "Features")
    )


def _last_lines(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:])[:400]
