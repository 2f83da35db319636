"""The divergence by the compiled CPU kernel: logits are read once, and their gradient takes the student's
place."""

import torch
from torch import Tensor

from ..native import library
from ..native.tensors import address, kind, plain, threads


def cpp_divergence(
    student: Tensor,
    teacher: Tensor | None,
    kl: Tensor,
    ce: Tensor | None,
    targets: Tensor | None,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """See `divergence`. Computed in float32, sums in float64."""
    if teacher is not None and teacher.dtype != student.dtype:
        student, teacher = student.float(), teacher.float()
    student, teacher = student.contiguous(), None if teacher is None else teacher.contiguous()
    ids = None if targets is None else targets.to(torch.int64).contiguous()
    loss = torch.empty(len(student), dtype=torch.float32)
    d = None
    if gradient is not None:
        d = student if gradient == student.dtype else torch.empty_like(student, dtype=gradient)
    kl, ce = plain(kl), None if ce is None else plain(ce)
    library().call(
        "opensala_divergence",
        address(student),
        address(teacher),
        kind(student),
        address(kl),
        address(ce),
        address(ids),
        address(loss),
        address(d),
        0 if d is None else kind(d),
        *student.shape,
        threads(),
    )
    return loss, d
