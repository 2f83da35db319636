"""Compile every Triton kernel of the package for given GPUs, none needed: `python -m
tests.ops.compile_kernels 80 90 120`.

Prints one JSON line: {"kernels": names of all launched kernels, "cases": one report for each compilation}. It
is a program of its own because Triton decides at import whether kernels are interpreted, as they are in the
tests.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: Triton 3.9 warns otherwise

import triton  # noqa: E402 -- the variables above come first
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from opensala.ops.triton_common import CompileCase, shared_memory  # noqa: E402
from tests.ops import machine_code  # noqa: E402
from tests.ops.kernels import triton_modules  # noqa: E402

MAIN = 90  # every case is compiled for it; for other GPUs the first of each kernel
STRIDE = re.compile(r"^(?!per_row$).*_(b|t|h|n|p|s|row)$")


def launched_kernels(modules: list[ModuleType]) -> set[str]:
    found = {
        (f.module, f.fn.__name__) for m in modules for f in vars(m).values() if isinstance(f, JITFunction)
    }
    return {f"{module}.{name}" for module, name in found if name.endswith("_kernel")}


def cases_for(module: ModuleType, arch: int) -> list[CompileCase]:
    cases = list(module.compile_cases(arch)) if hasattr(module, "compile_cases") else []
    first: dict[int, CompileCase] = {}
    for case in cases:
        first.setdefault(id(case.kernel), case)
    return [*cases, *filter(None, map(far, first.values()))] if arch == MAIN else list(first.values())


def far(case: CompileCase) -> CompileCase | None:
    """The case with strides that take 64 bits, as those between the rows of a batch of long texts do; None
    without strides."""
    strides = {n: "i64" for n, kind in case.types.items() if kind == "i32" and STRIDE.match(n)}
    return case._replace(name=f"{case.name} far", types={**case.types, **strides}) if strides else None


def compile_case(case: CompileCase, arch: int) -> dict[str, Any]:
    kernel = case.kernel
    report: dict[str, Any] = {
        "name": case.name,
        "kernel": f"{kernel.module}.{kernel.fn.__name__}",
        "arch": arch,
        "limit": shared_memory(arch),
        "error": "",
    }
    unknown = [n for n in (*case.types, *case.constants) if n not in kernel.arg_names]
    missing = [n for n in kernel.arg_names if n not in case.types and n not in case.constants]
    if unknown or missing:
        return report | {"error": f"not arguments: {unknown}; without a type or a value: {missing}"}
    blunt = [
        n
        for i, n in enumerate(kernel.arg_names)
        if case.types.get(n, "").startswith("*") and kernel.params[i].do_not_specialize
    ]
    if blunt:
        return report | {"error": f"pointers of unknown alignment: {blunt}"}
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if not kernel.params[i].do_not_specialize and case.types.get(name, "").startswith(("*", "i"))
    }
    started = time.perf_counter()
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature, dict(case.constants), aligned),
            target=GPUTarget("cuda", arch, 32),
            options=dict(case.options),
        )
        usage = resources(compiled.asm["cubin"])
        code = facts_of(compiled.asm["cubin"]) if "*bf16" in case.types.values() else {}
    except Exception as problem:  # whatever a compiler raises is this test's finding
        return report | {"error": f"{type(problem).__name__}: {problem}"[-1500:]}
    return report | {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "together": together(usage["REG"], compiled.metadata.shared, compiled.metadata.num_warps, arch),
        **code,
        "seconds": round(time.perf_counter() - started, 2),
    }


def facts_of(cubin: bytes) -> dict[str, Any]:
    return machine_code.facts(machine_code.listing(cubin))


def together(registers: int, shared: int, warps: int, arch: int) -> int:
    """Programs that fit one multiprocessor at once."""
    of_warp = -(-registers * 32 // 256) * 256
    memory, most_warps = {80: (164, 64), 90: (228, 64), 120: (100, 48)}[arch]
    return min(65536 // (of_warp * warps), memory * 1024 // (shared + 1024), most_warps // warps)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the kernel in a cubin, as the disassembler that comes with Triton tells
    them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def main(archs: list[int]) -> None:
    modules = triton_modules()
    reports = [
        compile_case(case, arch) for arch in archs for module in modules for case in cases_for(module, arch)
    ]
    print(json.dumps({"kernels": sorted(launched_kernels(modules)), "cases": reports}))


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [MAIN])
