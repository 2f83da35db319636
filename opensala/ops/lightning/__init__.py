"""Lightning attention: linear attention with a constant decay per head (architecture: Lightning layer)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from ..checks import check_boundaries, head_dim_limit
from .chunk import chunk_lightning_attention
from .cpp import cpp_lightning_attention
from .naive import naive_lightning_attention
from .slots import cpp_lightning_slots, gather_lightning_slots

__all__ = ["alibi_slopes", "lightning_attention", "lightning_attention_slots"]


def alibi_slopes(num_heads: int) -> list[float]:
    """The ALiBi slope series, used as decay per token and head.

    For n a power of two: 2^(-8(h+1)/n). Otherwise the series of the largest power of two below n, then
    every second slope of the series of twice that power.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention with constant decay: S_t = exp(-decay_h) S_{t-1} + k_t v_t^T, o_t = scale * q_t S_t.

    Args:
        q (Tensor): queries of shape `[B, T, H, D]`.
        k (Tensor): keys of shape `[B, T, H, D]`.
        v (Tensor): values of shape `[B, T, H, Dv]`.
        decay (Tensor): non-negative decay rate per head and token, `[H]`; no gradient flows to it.
        scale (float): factor on the output; 1/sqrt(D) if None.
        initial_state (Tensor): state to start from, `[N, H, D, Dv]`, zeros if None.
        cu_seqlens (Tensor): `[N + 1]` integer boundaries of N documents packed into one row (B must be 1). On
            a GPU their values are not checked: that would make the CPU wait.
        backend: which implementation runs; chosen by `choose_backend` if None.

    Returns:
        o `[B, T, H, Dv]` in v's dtype, and the state after the last token of each sequence,
        `[N, H, D, Dv]` in float32 (float64 for float64 inputs). N = B without `cu_seqlens`.

    Raises:
        ValueError: shapes that do not fit together, B > 1 with `cu_seqlens`, or an unavailable backend.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1; Lightning Attention-2 (arXiv 2401.04658).
    """
    _check(q, k, v, decay, initial_state, cu_seqlens)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    name = choose_backend("lightning_attention", q, backend, {"cpp": None, "triton": head_dim_limit(q, v)})
    run = _implementation(name)
    return run(q, k, v, decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def lightning_attention_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    states: Tensor,
    *,
    cu_seqlens: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`lightning_attention` for the next tokens of N sequences, whose states lie in slots. No gradients.

    Args:
        q, k (Tensor): `[T, H, D]`, the tokens of all sequences behind one another.
        v (Tensor): `[T, H, Dv]`.
        decay (Tensor): `[H]`, as in `lightning_attention`.
        states (Tensor): `[slots, H, D, Dv]`, float32 (float64 for float64 inputs), contiguous; modified in
            place.
        cu_seqlens (Tensor): `[N + 1]` integer boundaries of the sequences.
        read_slots (Tensor): `[N]` slots of the states the sequences begin with; -1 for zeros.
        write_slots (Tensor): `[N]` slots for the states behind their last tokens; each may be the one that
            its own sequence reads, but not one that another sequence of the call reads or writes.
        scale (float): factor on the output; 1/sqrt(D) if None.
        backend: which implementation runs. With `cpp` a token's output and state have the same bits however a
            sequence was cut into calls and whatever else is in the call; with the others they do not.

    The numbers in `cu_seqlens`, `read_slots` and `write_slots` are trusted: on a GPU a look would make the
        CPU wait.

    Returns:
        o `[T, H, Dv]` in v's dtype.

    Raises:
        ValueError: tensors that do not fit together, or an unavailable backend.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1.
    """
    wanted = (*q.shape[1:], v.shape[-1])
    if q.dim() != 3 or k.shape != q.shape or v.shape[:2] != q.shape[:2] or decay.shape != q.shape[1:2]:
        raise ValueError(
            f"q, k, v, decay must be [T, H, D], [T, H, D], [T, H, Dv], [H]; got {list(q.shape)}, "
            f"{list(k.shape)}, "
            f"{list(v.shape)}, {list(decay.shape)}"
        )
    if states.shape[1:] != wanted or not states.is_contiguous() or states.dtype not in _STATE_DTYPES:
        raise ValueError(
            f"states must be [slots, H, D, Dv] = [slots, {', '.join(map(str, wanted))}], contiguous, "
            "float32 or float64; "
            f"got {list(states.shape)}, {str(states.dtype).removeprefix('torch.')}"
        )
    if not len(cu_seqlens) - 1 == len(read_slots) == len(write_slots):
        raise ValueError(
            f"cu_seqlens [N + 1], read_slots [N], write_slots [N] must agree on N, got {len(cu_seqlens)}, "
            f"{len(read_slots)}, {len(write_slots)}"
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    like = q if states.dtype == torch.float32 else states
    name = choose_backend(
        "lightning_attention_slots", like, backend, {"cpp": None, "triton": head_dim_limit(q, v)}
    )
    places = (cu_seqlens, read_slots, write_slots)
    with torch.no_grad():
        if name == "cpp":
            return cpp_lightning_slots(q, k, v, decay, states, *places, scale).to(v.dtype)
        if name == "triton":
            from .triton_slots import triton_lightning_slots  # needs the package triton

            return triton_lightning_slots(q, k, v, decay, states, *places, scale)
        return gather_lightning_slots(q, k, v, decay, states, *places, scale, _implementation(name))


_STATE_DTYPES = (torch.float32, torch.float64)


def _implementation(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if name == "triton":
        from .triton import triton_lightning_attention  # needs the package triton

        return triton_lightning_attention
    return {
        "naive": naive_lightning_attention,
        "torch": chunk_lightning_attention,
        "cpp": cpp_lightning_attention,
    }[name]


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q, k, v must be [B, T, H, D], [B, T, H, D], [B, T, H, Dv]; got {list(q.shape)}, "
            f"{list(k.shape)}, "
            f"{list(v.shape)}. Repeat k and v to the query heads first."
        )
    if decay.shape != (q.shape[2],):
        raise ValueError(
            f"decay must have one rate for each of {q.shape[2]} heads; got shape {list(decay.shape)}"
        )
    sequences = q.shape[0]
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens needs batch size 1, got {q.shape[0]}: flatten the documents into one row"
            )
        check_boundaries("cu_seqlens", cu_seqlens, q.shape[1])
        sequences = len(cu_seqlens) - 1
    expected = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must have shape {list(expected)}, got {list(initial_state.shape)}")
