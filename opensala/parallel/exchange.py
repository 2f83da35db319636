"""What ranks that share a sequence tell each other: keys and values whole, Lightning states by a scan.

Both are autograd Functions: the backward pass of a gather adds up what every rank made of a token's key and
value and returns it to the rank that holds the token; that of the scan is a scan from the last rank to the
first. Every rank of a group must call them in the same order, forward and backward, with tensors of the same
shape.

Shapes: B rows, T tokens per rank, H heads, D/E key/value dim, R ranks.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.13 has new names for them
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

TILE = 4096  # tokens whose weighted keys exist at once
_FARTHEST = 80.0  # where the decay has passed exp(-80) the kernels take it for 0, and so do we


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ranks, batch = dist.get_world_size(group), x.shape[0]
        out = x.new_empty(ranks * batch, *x.shape[1:])
        all_gather(out, x.contiguous(), group=group)
        return out.unflatten(0, (ranks, batch)).transpose(0, 1).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, ranks = grads[0], dist.get_world_size(ctx.group)
        # in float32: half-precision sums over many ranks would lose what each of them adds
        wide = grad if grad.dtype == torch.float64 else grad.float()
        parts = wide.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        own = parts.new_empty(parts.shape[0] // ranks, *parts.shape[1:])
        reduce_scatter(own, parts, group=ctx.group)
        return own.to(grad.dtype), None


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The stretches `[B, T, ...]` of all ranks, one behind the other: `[B, R * T, ...]`. Differentiable
    once."""
    return _Gather.apply(x, group)


def _rates(slopes: list[float]) -> Tensor:
    """Slopes as the mixers hand them to the kernels: rounded to float32. `[H]` float64."""
    return torch.tensor(slopes, dtype=torch.float32).double()


def decays_between(slopes: list[float], tokens: int, reach: tuple[int, ...]) -> Tensor:
    """How much of the state rank j leaves arrives at rank r: `[R, R, H]` float64, first r, then j.

    exp(-slope * tokens) for each rank between them; 0 if the sequence that enters rank r begins behind rank
    j.
    """
    rank = torch.arange(len(reach))
    between = (rank[:, None] - 1 - rank).double()
    inside = (between >= 0) & (between < torch.tensor(reach)[:, None])
    exponent = _rates(slopes) * tokens * between[..., None].clamp(min=0)
    return torch.where(inside[..., None] & (exponent <= _FARTHEST), torch.exp(-exponent), 0.0)


def _tiles(slopes: list[float], tokens: int, like: Tensor) -> list[tuple[int, int, Tensor]]:
    """Stretches of the last `tokens` tokens that still count at their end, counted from it, and weights `[b -
    a, H, 1]`."""
    least = min(slopes)
    near = min(tokens, math.ceil(_FARTHEST / least)) if least > 0 else tokens
    tiles = []
    for stop in range(0, near, TILE):
        steps = torch.arange(min(stop + TILE, near) - 1, stop - 1, -1, dtype=torch.float64)
        exponent = steps[:, None] * _rates(slopes)
        weights = torch.where(exponent <= _FARTHEST, torch.exp(-exponent), 0.0).to(like.device, like.dtype)
        tiles.append((len(steps) + stop, stop, weights[..., None]))
    return tiles


def _tile(x: Tensor, first: int, stop: int) -> Tensor:
    return x[:, x.shape[1] - first : x.shape[1] - stop]


class _StateBefore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        slopes: list[float],
        tokens: int,
        between: Tensor,
        group: dist.ProcessGroup,
    ) -> Tensor:
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        ctx.save_for_backward(k, v)
        ctx.slopes, ctx.tokens, ctx.group, ctx.wide = slopes, tokens, group, wide
        ctx.between = between = between.to(k.device, wide)
        local = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=wide)
        for first, stop, weights in _tiles(slopes, tokens, local):
            local += torch.einsum(
                "bthd,bthe->bhde", _tile(k, first, stop) * weights, _tile(v, first, stop).to(wide)
            )
        return torch.einsum("jh,jbhde->bhde", between[dist.get_rank(group)], _everywhere(local, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v = ctx.saved_tensors
        arriving = _everywhere(grads[0].to(ctx.wide), ctx.group)
        grad = torch.einsum("rh,rbhde->bhde", ctx.between[:, dist.get_rank(ctx.group)], arriving)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for first, stop, weights in _tiles(ctx.slopes, ctx.tokens, grad):
            keys, values = (_tile(x, first, stop).to(ctx.wide) for x in (k, v))
            _tile(dk, first, stop).copy_(torch.einsum("bthe,bhde->bthd", values * weights, grad))
            _tile(dv, first, stop).copy_(torch.einsum("bthd,bhde->bthe", keys * weights, grad))
        return dk, dv, None, None, None, None


def _everywhere(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x `[...]` of every rank, `[R, ...]`."""
    ranks = dist.get_world_size(group)
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    all_gather(out, x.contiguous(), group=group)
    return out.unflatten(0, (ranks, x.shape[0]))


def state_before(
    k: Tensor,
    v: Tensor,
    slopes: list[float],
    tokens: int,
    reach: tuple[int, ...],
    length: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """The Lightning state in which the sequence at this rank's first token arrives: an exclusive scan over
    ranks.

    Args:
        k, v: `[B, T, H, D]`, `[B, T, H, E]` of this rank.
        slopes: decay per token of each head.
        tokens: how many of the last tokens here belong to the sequence that continues behind them.
        reach: how many ranks back the sequence at the first token of rank 0, 1, ... begins.
        length: tokens per rank, T.

    Returns:
        `[B, H, D, E]` float32 (float64 for float64); zero if the sequence begins here. Differentiable once.
    """
    return _StateBefore.apply(k, v, slopes, tokens, decays_between(slopes, length, reach), group)
