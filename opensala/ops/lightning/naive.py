"""The reference implementation of Lightning attention: one token after the other, in the dtype it is given.

This file is the ground truth every fast path is compared with (call it in float64). It deliberately
knows nothing about chunks, devices or speed.
"""

import torch
from torch import Tensor


def naive_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(-decay) S_{t-1} + k_t v_t^T;  o_t = scale * q_t S_t  (the diagonal term is undecayed).

    Args:
        q, k: `[B, T, H, D]`; v: `[B, T, H, Dv]`; decay: `[H]`, non-negative, per token.
        initial_state: `[N, H, D, Dv]`, N = B, or the number of documents with `cu_seqlens`.
        cu_seqlens: `[N + 1]` boundaries of documents packed in one row (B = 1); the state restarts at each.

    Returns:
        o `[B, T, H, Dv]` and the final state of each sequence `[N, H, D, Dv]`.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            naive_lightning_attention(
                q[:, a:b],
                k[:, a:b],
                v[:, a:b],
                decay,
                scale=scale,
                initial_state=None if initial_state is None else initial_state[n : n + 1],
            )
            for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 0)

    batch, length, heads, dim = q.shape
    state = (
        q.new_zeros(batch, heads, dim, v.shape[-1]) if initial_state is None else initial_state.to(q.dtype)
    )
    keep = torch.exp(-decay.to(q.dtype))[None, :, None, None]
    outputs = []
    for t in range(length):
        state = keep * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhd,bhde->bhe", q[:, t], state))
    o = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return o, state
