"""What this machine's processor is called and which vector extensions it has, as far as the system tells."""

import functools
import platform
from pathlib import Path

# those that decide how fast a product of some dtype can be
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


@functools.cache
def _lines() -> dict[str, str]:
    """The first line of each kind of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def processor_name() -> str:
    """The processor's model name where the system tells it."""
    return _lines().get("model name") or platform.processor() or platform.machine()


def processor_features() -> tuple[str, ...]:
    """Those of `FEATURES` that the processor has, in that order; none where the system does not tell."""
    known = {*_lines().get("flags", "").split(), *_lines().get("Features", "").split()}
    return tuple(name for name in FEATURES if name in known)
