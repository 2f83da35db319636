"""GPTQ: one weight matrix in few bits, each column's rounding error passed on to the columns behind it.

The error that counts is that of the layer's output on calibration inputs, ||X (W - Wq)^T||^2 = tr(D H D^T)
with D = W - Wq and H = X^T X. Rounding column k by d and moving the others by -d H^-1[k, k:] / H^-1[k, k]
keeps it least; a Cholesky factor of H^-1 has all those rows at once (arXiv 2210.17323, sections 3.2 and 3.3).
Columns are taken in their own order: reordering by activation ("act-order") gains little with groups and
slows readers down.

Shapes: N outputs, K inputs, groups of G columns.
"""

import torch
from torch import Tensor

from ..ops.linear.gptq import Codes

DAMPING = 0.01  # of the mean of H's diagonal, added so that all directions can be inverted
_BLOCK = 128  # columns whose errors reach those beyond the block in one product
# of the scale at which the largest weight of a group just fits: clipping it may leave less error in the
# others
_SHRINK = tuple(1.0 - 0.05 * i for i in range(9))
_SMALLEST = 2.0**-24  # of float16


def quantise_matrix(
    weight: Tensor, hessian: Tensor, *, bits: int, group: int, damping: float = DAMPING
) -> tuple[Codes, float]:
    """Codes of a matrix, symmetric around the middle code, with a float16 scale for each group.

    Args:
        weight: `[N, K]`.
        hessian: `[K, K]`, X^T X of calibration inputs X (any positive multiple of it).
        bits: 4 or 8.
        group: G, which divides K; -1 for K.

    Returns:
        The codes, and the relative error of the layer's output on the calibration inputs.

    Raises:
        ValueError: numbers that are not finite.
    """
    if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(hessian).all())):
        raise ValueError("the weights or the calibration inputs hold numbers that are not finite")
    outer, inner = weight.shape
    size = inner if group == -1 else group
    left, factor = weight.float().clone(), _inverse_factor(hessian, damping)
    middle = 1 << bits - 1
    codes = torch.empty(outer, inner, dtype=torch.int32)
    scales = torch.empty(outer, inner // size)
    importance = hessian.diagonal().float()
    for start in range(0, inner, _BLOCK):
        end = min(inner, start + _BLOCK)
        errors = torch.zeros(outer, end - start)
        for k in range(start, end):
            if k % size == 0:  # a block may begin within a group, and a group within a block
                own = left[:, k : k + size].clone()
                own[:, end - k :] -= errors[:, : k - start] @ factor[start:k, end : k + size]
                scales[:, k // size] = _scale(own, importance[k : k + size], middle)
            scale = scales[:, k // size]
            level = (left[:, k] / scale).round().clamp(-middle, middle - 1)
            codes[:, k] = (level + middle).to(torch.int32)
            error = (left[:, k] - level * scale) / factor[k, k]
            errors[:, k - start] = error
            left[:, k:end] -= error[:, None] * factor[k, k:end]
        left[:, end:] -= errors @ factor[start:end, end:]
    groups = torch.arange(inner) // size
    made = Codes(codes, scales, torch.full_like(scales, middle).to(torch.int32), groups)
    return made, output_error(weight, made.weights(), hessian)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor `[K, K]` of the inverse of the damped Hessian, float32.

    Inputs that were always zero say nothing about their columns: those count alone.
    """
    wide = hessian.double().clone()
    diagonal = wide.diagonal()
    mean = diagonal.mean().clamp(min=1e-30)
    diagonal[diagonal <= 0] = mean
    while True:
        damped = wide + damping * mean * torch.eye(wide.shape[0], dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping = 10 * max(damping, 1e-6)  # fewer inputs than columns: more damping, until it can be inverted


def _scale(weights: Tensor, importance: Tensor, middle: int) -> Tensor:
    """The scale `[N]` of a group `[N, G]`, in float16's numbers: of some, the one with the least error in the
    columns weighted by `importance` `[G]`."""
    largest = weights.abs().amax(1) / (middle - 1)
    best, least = torch.full_like(largest, _SMALLEST), torch.full_like(largest, torch.inf)
    for shrink in _SHRINK:
        scale = (largest * shrink).clamp(min=_SMALLEST).half().float()[:, None]
        levels = (weights / scale).round().clamp(-middle, middle - 1)
        error = ((weights - levels * scale).square() * importance).sum(1)
        best = torch.where(error < least, scale[:, 0], best)
        least = torch.minimum(error, least)
    return best


def output_error(weight: Tensor, quantised: Tensor, hessian: Tensor) -> float:
    """||X (W - Wq)^T|| / ||X W^T|| on the inputs X of a Hessian."""
    wide, wanted = hessian.double(), weight.double()
    off = wanted - quantised.double()
    size = ((wanted @ wide) * wanted).sum().clamp(min=1e-30)
    return float((((off @ wide) * off).sum().clamp(min=0) / size).sqrt())
