"""`opensala bench llama-cpp`: llama.cpp built for this processor, in an environment of its own.

From PyPI's source package (the wheels there are are for older processors). It takes a C++ compiler, CMake
from pip, and some minutes of both cores.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

from ...ops.native import cache_folder

PACKAGE = "llama-cpp-python==0.3.36"
VARIABLE = "OPENSALA_LLAMA_CPP"  # a Python that has it already
_ARGUMENTS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"  # the part for pictures is half of the building


def environment() -> Path:
    """Where the environment lies, or will."""
    return cache_folder() / "llama-cpp"


def find_python(asked: str | None = None) -> str | None:
    """A Python with llama.cpp: the one asked for, that of the variable, or that of the environment made here;
    None
    without any.

    Raises:
        ValueError: one was asked for that has it not.
    """
    named = asked or os.environ.get(VARIABLE)
    made = environment() / "bin" / "python"
    python = named or (str(made) if made.is_file() else None)
    if python is None:
        return None
    found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:] or ["it does not start"]
        raise ValueError(f"{python} cannot import llama_cpp ({reason[0]}): run `opensala bench llama-cpp`")
    return python


def build() -> str:
    """Make the environment and build llama.cpp in it; its Python. pip's own output goes to stderr.

    Raises:
        ValueError: it could not be built.
    """
    folder = environment()
    if (folder / "bin" / "python").is_file() and find_python(str(folder / "bin" / "python")):
        return str(folder / "bin" / "python")
    print(f"building {PACKAGE} in {folder}: about ten minutes of two cores", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--no-binary", "llama-cpp-python", PACKAGE]
    done = subprocess.run(command, env={**os.environ, "CMAKE_ARGS": _ARGUMENTS}, stdout=sys.stderr)
    if done.returncode:
        raise ValueError(f"{PACKAGE} could not be built; pip said why above (a C++ compiler is needed)")
    return python
