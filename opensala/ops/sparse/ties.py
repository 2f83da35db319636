"""Blocks that tie exactly at the edge of a choice, decided as the reference decides them.

Neighbouring blocks share a window, so their scores are often the same number. The reference leaves the
choice to torch.topk on a CPU over the blocks a query sees, an order that follows from its algorithm and that
no GPU kernel has. The fast rule of the Triton kernels is: of blocks that tie, the lower numbers. Inside of
`exact_ties` their kernel also says which rows are tied, and those rows are decided again, by the reference
rule, on the CPU. That waits for the GPU: it is for comparisons, not for serving.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .spec import BlockSpec

LARGEST = 3e38  # finite stand-in for overflowing probabilities, below the +inf of forced blocks
_exact: ContextVar[bool] = ContextVar("opensala_exact_ties", default=False)


@contextmanager
def exact_ties(wanted: bool = True) -> Iterator[None]:
    """Inside, `select_blocks` and `select_blocks_paged` decide ties as the reference does, whatever the
    backend."""
    token = _exact.set(wanted)
    try:
        yield
    finally:
        _exact.reset(token)


def ties_are_exact() -> bool:
    return _exact.get()


def settle(scores: Tensor, out: Tensor, tied: Tensor, spec: BlockSpec) -> None:
    """Choose again, in place, in the tied rows of out `[R, num_blocks]`.

    Args:
        scores (Tensor): block scores `[R, N]`, negative without a visible window; entries of forced blocks
            may be anything.
        tied (Tensor): `[R]` int32, the blocks that a tied row's query sees, 0 for the other rows.
    """
    rows = tied.nonzero()[:, 0]
    if rows.numel() == 0:
        return
    seen, pooled = tied[rows].cpu(), scores[rows].cpu()
    chosen = torch.empty(len(rows), spec.num_blocks, dtype=out.dtype)
    for blocks in seen.unique().tolist():
        mine = seen == blocks
        number = torch.arange(blocks)
        forced = (number < spec.init_blocks) | (blocks - 1 - number <= spec.window_blocks)
        row = pooled[mine, :blocks].clamp(max=LARGEST)
        row = torch.where(row < 0, -torch.inf, row).masked_fill(forced, torch.inf)
        best = row.topk(spec.num_blocks, dim=-1, sorted=False).indices.sort(-1).values
        chosen[mine] = best.to(out.dtype)
    out[rows] = chosen.to(out.device)
