"""How far one next-token distribution is from another, and the gradient of that by the logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from .cpp import cpp_divergence
from .plain import plain_divergence

__all__ = ["TokenWeights", "divergence"]


class TokenWeights(NamedTuple):
    """What each token counts, `[N]` float32: `kl` for the divergence there, `ce` for the cross-entropy of
    `targets` `[N]` int64, the tokens that follow. The loss is the sum of both; nothing is divided."""

    kl: Tensor
    ce: Tensor | None = None
    targets: Tensor | None = None


def divergence(
    student: Tensor,
    teacher: Tensor | None,
    weights: TokenWeights,
    *,
    gradient: torch.dtype | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """weights.kl * KL(softmax(teacher) || softmax(student)) + weights.ce * cross-entropy, token by token.

    Args:
        student, teacher (Tensor): logits `[N, V]`, overwritten. Without the teacher's there is only
            cross-entropy.
        weights (TokenWeights): of each token.
        gradient: dtype of the gradient; no gradient is made if None.
        backend: which implementation runs. This op makes its gradient itself: autograd does not see it.

    Returns:
        The losses `[N]` float32, and their gradient by the student's logits `[N, V]` or None.

    Raises:
        ValueError: shapes that do not fit together, or an unavailable backend.
    """
    rows = student.shape[0]
    if student.dim() != 2 or (teacher is not None and teacher.shape != student.shape):
        raise ValueError(
            f"student and teacher must be logits [N, V], got {list(student.shape)} and "
            f"{None if teacher is None else list(teacher.shape)}"
        )
    if (weights.ce is None) != (weights.targets is None):
        raise ValueError("weights.ce and weights.targets come together")
    for name, x in zip(weights._fields, weights, strict=True):
        if x is not None and x.shape != (rows,):
            raise ValueError(f"weights.{name} must be [{rows}], got {list(x.shape)}")
    limit = "its gradient would be float64" if gradient == torch.float64 else None
    name = choose_backend("divergence", student, backend, {"cpp": limit, "triton": None})
    if name == "triton":
        from .triton import triton_divergence  # needs the package triton

        return triton_divergence(student, teacher, weights.kl, weights.ce, weights.targets, gradient)
    run = cpp_divergence if name == "cpp" else plain_divergence
    return run(student, teacher, weights.kl, weights.ce, weights.targets, gradient)
