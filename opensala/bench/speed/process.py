"""Contenders as processes: started, asked, and gone when they die, which is a result and no error."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .llama_setup import find_python

DIED = "out of memory: the system ended it"


@dataclass(frozen=True)
class Contender:
    """One of what is compared.

    Attributes:
        name: as it is chosen and printed.
        kind: `hybrid`, `dense` or `llama`.
        weights: what its weights are stored in.
    """

    name: str
    kind: str
    weights: str


HYBRID = "MiniCPM-SALA"
CONTENDERS = {
    c.name: c
    for c in (
        *(Contender(f"sala-{w}", "hybrid", w) for w in ("float32", "bfloat16", "int8", "int4")),
        *(Contender(f"transformers-{w}", "dense", w) for w in ("float32", "bfloat16")),
        *(Contender(f"llama.cpp-{w}", "llama", w) for w in ("F16", "Q8_0", "Q4_0")),
    )
}
PARTNER = {"bfloat16": "F16", "int8": "Q8_0", "int4": "Q4_0"}  # of the same number of bits


class Process:
    """A worker under way.

    Args:
        contender: what it runs.
        preset: name of the shapes.
        device: `cpu` or `cuda`.
        threads: of a CPU.
        file: the GGUF file of a `llama`.
        llama: the Python that has llama.cpp.
    """

    def __init__(
        self,
        contender: Contender,
        preset: str,
        device: str,
        threads: int,
        file: Path | None = None,
        llama: str | None = None,
    ) -> None:
        self.contender, self.oom = contender, ""
        if contender.kind == "llama":
            python = find_python(llama)
            assert python and file, "asked for only where both are there"
            command = [python, str(Path(__file__).with_name("llama_worker.py")), str(file), str(threads)]
        else:
            kind = [contender.kind, preset, contender.weights, device]
            command = [sys.executable, "-m", f"{__package__}.worker", *kind]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._errors = open(os.devnull, "w") if contender.kind == "llama" else None  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.said = self._reply()

    def ask(self, op: str, **values: int) -> dict[str, Any]:
        """The worker's answer; empty once it is out of memory (`oom` then says so)."""
        if self.oom:
            return {}
        assert self.process.stdin is not None, "a pipe"
        try:
            self.process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.oom = DIED
            return {}
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None, "a pipe"
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            if code != -9:  # ended by the system for want of memory; anything else is a defect
                raise ValueError(f"{self.contender.name} ended with exit code {code}; its output says why")
            self.oom = DIED
            return {}
        found = json.loads(line)
        self.oom = found.get("oom", "")
        return {} if self.oom else found

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        if self._errors is not None:
            self._errors.close()

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self.process.kill()
        self.close()
