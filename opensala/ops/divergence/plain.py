"""The divergence in PyTorch's own operators: right on any device, some thirty passes over the logits."""

import torch
from torch import Tensor


def plain_divergence(
    student: Tensor,
    teacher: Tensor | None,
    kl: Tensor,
    ce: Tensor | None,
    targets: Tensor | None,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """See `divergence`."""
    ls = _log_softmax(student)
    loss = torch.zeros(len(kl), dtype=ls.dtype, device=ls.device)
    pt, share = None, torch.zeros_like(loss)
    if teacher is not None:
        lt = _log_softmax(teacher)
        pt, share = lt.exp(), share + kl
        loss = loss + (pt * lt.sub_(ls)).sum(1) * kl
    if ce is not None and targets is not None:
        loss = loss - ls.gather(1, targets[:, None])[:, 0] * ce
        share = share + ce
    if gradient is None:
        return loss.float(), None
    d = ls.exp_().mul_(share[:, None])
    if pt is not None:
        d.sub_(pt.mul_(kl[:, None]))
    if ce is not None and targets is not None:
        d.scatter_add_(1, targets[:, None], -ce[:, None].to(d.dtype))
    return loss.float(), d.to(gradient)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 (float64 for float64), in the place of the logits where they are of that dtype."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.sub_(torch.logsumexp(wide, 1, keepdim=True))
