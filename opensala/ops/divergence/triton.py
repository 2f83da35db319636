"""The divergence in Triton: logits are read twice and their gradient is written once.

One program has a row: it walks through the vocabulary to find both normalisers and the divergence, carrying
the largest logits so far, and once more for the gradient, the second time partly from the cache.
"""

import torch
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, computable, on_device
from .triton_kernels import divergence_kernel

BLOCK = 4096  # logits of a row that a program holds at a time
WARPS = 8


def triton_divergence(
    student: Tensor,
    teacher: Tensor | None,
    kl: Tensor,
    ce: Tensor | None,
    targets: Tensor | None,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """See `divergence`. The logits are left as they are."""
    rows, vocabulary = student.shape
    student = computable(student).contiguous()
    teacher = None if teacher is None else computable(teacher).contiguous()
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    d = None
    if gradient is not None:  # the interpreter rounds to bfloat16 wrongly: there it writes float32
        d = torch.empty_like(student, dtype=torch.float32 if triton_interpreted() else gradient)
    with on_device(student):
        divergence_kernel[(rows,)](
            student,
            teacher,
            kl.float().contiguous(),
            None if ce is None else ce.float().contiguous(),
            None if targets is None else targets.contiguous(),
            loss,
            d,
            vocabulary,
            BLOCK=min(BLOCK, max(16, 1 << (vocabulary - 1).bit_length())),
            num_warps=WARPS,
        )
    return loss, None if d is None or gradient is None else d.to(gradient)


def compile_cases(_arch: int) -> CompileCases:
    """With everything, as distillation has it."""
    types = {
        **dict.fromkeys(("student", "teacher", "kl", "ce", "loss"), "*fp32"),
        "targets": "*i64",
        "gradient": "*bf16",
        "vocabulary": "i32",
    }
    yield CompileCase("fp32", divergence_kernel, types, {"BLOCK": BLOCK}, {"num_warps": WARPS})
