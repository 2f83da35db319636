"""Lightning attention of several sequences at once, whose states lie in slots: for inference, no
gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..native import library
from ..native.tensors import address, plain, threads


def cpp_lightning_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    states: Tensor,
    cu_seqlens: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    scale: float,
) -> Tensor:
    """See `lightning_attention_slots`; computes in float32."""
    q, k, v = (plain(x) for x in (q, k, v))
    bounds, read, write = (x.to(torch.int32).contiguous() for x in (cu_seqlens, read_slots, write_slots))
    out = torch.empty_like(v)
    library().call(
        "opensala_lightning_slots",
        address(q),
        address(k),
        address(v),
        address(plain(decay)),
        address(out),
        address(states),
        address(bounds),
        address(read),
        address(write),
        len(read),
        *k.shape[1:],
        v.shape[2],
        float(scale),
        threads(),
    )
    return out


def gather_lightning_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    states: Tensor,
    cu_seqlens: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    scale: float,
    run: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """See `lightning_attention_slots`: states are gathered and scattered around an op on whole sequences."""
    read = read_slots.long()
    begin = torch.where((read >= 0)[:, None, None, None], states[read.clamp(min=0)], states.new_zeros(()))
    out, end = run(q[None], k[None], v[None], decay, scale=scale, initial_state=begin, cu_seqlens=cu_seqlens)
    states.index_copy_(0, write_slots.long(), end.to(states.dtype))
    return out[0]
