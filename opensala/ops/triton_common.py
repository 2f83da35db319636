# mypy: allow-untyped-defs
"""What the Triton kernels of all ops share: padding, devices, the interpreter's limits, packed documents,
compile cases.

Conventions of every `triton*.py` beside an op, which tests/ops/test_triton_compile.py relies on:

- A kernel that is launched has a name that ends in `_kernel`; device functions that kernels call do not.
- The module has `compile_cases(arch)`: it yields a `CompileCase` for each telling configuration of each of
  its kernels, built by the same configuration function that launches use. The test compiles them for compute
  capability `arch` (80, 90, 120) without a GPU, and refuses spills and too much shared memory; a kernel
  without a case is an error too.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import triton_interpreted

# Bytes of shared memory that one program may use. A capability that is not listed gets the smallest of these.
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
}


class CompileCase(NamedTuple):
    """One kernel in one configuration, for compilation ahead of time.

    `types` gives the run-time arguments as Triton writes types ("*bf16", "*fp32", "*i32", "i32", "i64",
    "fp32");
    `constants` all other arguments: the constexprs, None for absent pointers, and 1 for strides that are 1 (a
    launch turns both into constants). `options` are num_warps and num_stages. Run-time pointers and integers
    are taken to be divisible by 16, as the tensors of a real model are, but for those that the kernel does
    not specialize.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]


CompileCases = Iterator[CompileCase]


def padded(dim: int) -> int:
    """The width of the block that holds a head dimension: a power of two, at least 16 (the smallest side of a
    product)."""
    return max(16, 1 << (dim - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def computable(x: Tensor) -> Tensor:
    """x, or x in float32 where its dtype is bfloat16 and kernels are interpreted: the interpreter gets
    bfloat16 wrong."""
    return x.float() if x.dtype == torch.bfloat16 and triton_interpreted() else x


def arch_of(device: torch.device) -> int:
    """Compute capability as one number (90 for 9.0); in the interpreter that of an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_memory(arch: int) -> int:
    """Bytes of shared memory that a program may use on this compute capability."""
    return SHARED_MEMORY.get(arch, min(SHARED_MEMORY.values()))


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """A launch goes to the current device: make that the one x is on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def search_steps(documents: int) -> int:
    """Halvings that `find_document` needs among this many documents."""
    return max(1, documents).bit_length()


@triton.jit
def find_document(cu, slot, documents, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Which document owns slot number `slot`, when documents [cu[n], cu[n + 1]) are cut into blocks of BLOCK
    tokens each.

    Document n owns the slots from cu[n] // BLOCK + n up to those of document n + 1. That is at least as many
    as it has blocks (the rest stay idle), T // BLOCK + N slots hold all, and nobody has to sum the documents'
    blocks beforehand.
    Returns (n, block of the document); the block may lie past the document's end.
    """
    low = slot * 0  # the last document whose first slot is not past `slot`
    high = low + documents
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        first = tl.load(cu + middle).to(tl.int64) // BLOCK + middle
        ours = (middle < high) & (first <= slot)
        low = tl.where(ours, middle, low)
        high = tl.where(ours, high, middle)
    return low, slot - (tl.load(cu + low).to(tl.int64) // BLOCK + low)


@triton.jit
def find_sequence(cu, token, sequences, STEPS: tl.constexpr):
    """The sequence n with cu[n] <= token < cu[n + 1], of packed sequences some of which may be empty."""
    low = token * 0
    high = low + sequences
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        ours = (middle < high) & (tl.load(cu + middle) <= token)
        low = tl.where(ours, middle, low)
        high = tl.where(ours, high, middle)
    return low
