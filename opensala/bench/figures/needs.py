"""What steps need beside this package: whether it is here, and what to do where it is not."""

import importlib.util
import shutil
import subprocess
from collections.abc import Callable

from ...hub import installed
from ...model.auto_round import why_not
from ..speed.llama_setup import find_python

HYBRID, BASE = "smollm2-135m-sala", "smollm2-135m"


def _llama_cpp() -> str | None:
    try:
        return None if find_python() else "llama.cpp is not built: opensala bench llama-cpp"
    except ValueError as error:  # one was named that has it not
        return str(error)


def _llama_server() -> str | None:
    reason, python = _llama_cpp(), llama_python()
    if reason or python is None:
        return reason
    if subprocess.run([python, "-c", "import llama_cpp.server.app"], capture_output=True).returncode:
        return f"llama.cpp's server is not there: {python} -m pip install 'llama-cpp-python[server]'"
    return None


def llama_python() -> str | None:
    """The Python that has llama.cpp; None without one."""
    return None if _llama_cpp() else find_python()


def _llama_here() -> str | None:
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama_cpp is not in this Python: pip install llama-cpp-python"
    return None


def _pulled(name: str) -> Callable[[], str | None]:
    return lambda: None if installed(name) else f"{name} is not on this machine: opensala pull {name}"


def _serve() -> str | None:
    if importlib.util.find_spec("fastapi") is None:
        return "the server's packages are not there: pip install 'opensala[serve]'"
    return None


def _nginx() -> str | None:
    return None if shutil.which("nginx") else "nginx is not installed (Debian: apt-get install nginx-light)"


NEEDS: dict[str, Callable[[], str | None]] = {
    "llama.cpp": _llama_cpp,
    "llama.cpp's server": _llama_server,
    "llama_cpp": _llama_here,
    "hybrid": _pulled(HYBRID),
    "base": _pulled(BASE),
    "auto-round": why_not,
    "serve": _serve,
    "nginx": _nginx,
}


def lacking(needs: tuple[str, ...], gguf: str = "") -> str | None:
    """Why a step cannot run here, and what to do; None if it can. `gguf`: the base's GGUF file, if given."""
    for need in needs:
        if need == "gguf" and not gguf:
            return f"the GGUF file of {BASE} was not named: --gguf SmolLM2-135M-Instruct.Q4_1.gguf"
        reason = NEEDS[need]() if need != "gguf" else None
        if reason:
            return reason
    return None
