"""What the exported functions of the kernels take, read from their declarations in the C++ sources.

Python's types cannot tell: `scale=1` is a float to the kernel and an int to Python. The declarations can, and
being the only statement of the types they cannot go stale.
"""

import ctypes
import re

_FUNCTION = re.compile(r'extern "C" void (\w+)\(([^)]*)\)')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_NUMBERS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}


def declared(source: str) -> dict[str, tuple[type, ...]]:
    """ctypes types of the arguments of each `extern "C" void` function in C++ source text, by its name."""
    functions = _FUNCTION.findall(_COMMENT.sub("", source))
    return {name: tuple(_argument(text) for text in arguments.split(",")) for name, arguments in functions}


def _argument(text: str) -> type:
    if "*" in text:
        return ctypes.c_void_p
    words = text.split()
    assert words and words[0] in _NUMBERS, f"kernels take pointers, int64_t and float, not {text.strip()!r}"
    return _NUMBERS[words[0]]
