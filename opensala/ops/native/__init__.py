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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import program
from .signatures import declared

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
    """The loaded kernels by name, each with the types of its arguments; or the reason why there are none.

    `packed` has the address of each kernel's form for a `program`, where there is one.
    """

    functions: Mapping[str, tuple[Any, tuple[type, ...]]] = field(default_factory=dict)
    packed: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None

    def call(self, name: str, *arguments: object) -> None:
        """Call an exported function; an address is a ctypes.c_void_p or None.

        Raises TypeError for arguments that its declaration does not take.
        """
        assert self.reason is None, "the choice of backend asks for the reason first"
        function, types = self.functions[name]
        if len(arguments) != len(types):  # ctypes itself refuses too few, but not too many
            raise TypeError(f"{name} takes {len(types)} arguments, got {len(arguments)}")
        function(*arguments)
        if program.recording is not None:
            if name not in self.packed:
                raise program.NotReplayable(f"{name} has no packed form")
            program.recording.add(self.packed[name], types, arguments)


@functools.cache
def library() -> Library:
    """The kernels, compiled if this machine has not done so yet; loaded once a process."""
    compiler = find_compiler()
    if compiler is None:
        return Library(reason="no C++ compiler was found (g++ or clang++; the variable CXX names another)")
    try:
        return _load(build(compiler))
    except subprocess.CalledProcessError as error:
        return Library(reason=f"{compiler} could not compile the kernels: {_last_lines(error.stderr)}")
    except OSError as error:
        return Library(reason=f"the compiled kernels could not be stored or loaded: {error}")


def _load(path: Path) -> Library:
    handle, functions, packed = ctypes.CDLL(str(path)), {}, {}
    for source in sorted(Path(__file__).parent.glob("*.cpp")):
        for name, types in declared(source.read_text()).items():
            function = getattr(handle, name)
            function.argtypes, function.restype = types, None
            functions[name] = function, types
            if hasattr(handle, f"{name}_packed"):
                packed[name] = ctypes.cast(getattr(handle, f"{name}_packed"), ctypes.c_void_p).value or 0
    return Library(functions, packed)


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
    stem = f"kernels-{key.hexdigest()[:20]}"
    known = _intact(cache_folder(), stem)
    if known is not None:
        return known
    logger.info("compiling the CPU kernels with %s (once; some seconds) into %s", compiler, cache_folder())
    cache_folder().mkdir(parents=True, exist_ok=True)
    # Several processes may come here at once: each compiles in a folder of its own, and every name that a
    # rename gives says what the file holds.
    with tempfile.TemporaryDirectory(dir=cache_folder()) as work, ThreadPoolExecutor(os.cpu_count()) as pool:

        def run(arguments: list[str]) -> None:
            subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, text=True, check=True)

        objects = [str(Path(work) / f"{source.stem}.o") for source in sources]
        list(
            pool.map(
                run, (["-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True))
            )
        )
        linked = Path(work) / "kernels.so"
        run(["-shared", *objects, "-o", str(linked)])
        target = cache_folder() / f"{stem}-{_digest(linked)}.so"
        linked.rename(target)
    return target


def _intact(folder: Path, stem: str) -> Path | None:
    """The library of this name whose bytes are still those it was stored with; others are removed.

    A file cut short (a full disk, a machine that lost power) loads without an error and then ends the process
    with a bus error, so the name of each file carries the hash of its bytes.
    """
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.stem == f"{stem}-{_digest(path)}":
            return path
        logger.warning("%s is damaged: compiling it again", path)
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


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
