"""Lightning attention in chunks, in plain PyTorch: good on a CPU, right on any device, linear memory.

Inside a chunk of C tokens the attention is a masked, decayed C x C product, batched over all chunks and
heads; between chunks only the D x D states are scanned. Long inputs are cut into segments so that the
C x C products never exceed a fixed budget. The backward pass runs the same primitive three times (the
gradient of a decayed linear recurrence is a decayed linear recurrence), so nothing of size T x C is kept.

Shapes: B batch, T tokens, H heads, D key dim, E value dim, N sequences, M chunks of C tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import outside_autocast

CHUNK = 128  # tokens
SEGMENT_ELEMENTS = 1 << 24  # elements of the C x C products alive at once (64 MB in float32)
_MIN_EXPONENT = -80.0  # below this a decay factor is 0: smaller ones turn into slow denormal numbers


class _Layout(NamedTuple):
    """Where the tokens of one call lie in chunks: rows of chunks that share a state, in time order."""

    slots: Tensor  # [M * C] token in each place of each chunk (T for an empty place)
    valid: Tensor  # [M] tokens in each chunk
    sequence: list[int]  # [M] sequence each chunk belongs to


def _decay_power(decay: Tensor, steps: Tensor) -> Tensor:
    """exp(-decay * steps), with the tail cut to exactly zero. decay [H], steps [...] -> [H, ...]."""
    exponent = -decay.view(-1, *([1] * steps.dim())) * steps
    return torch.where(exponent < _MIN_EXPONENT, 0.0, torch.exp(exponent))


def _document_layout(bounds: list[int], chunk: int, device: torch.device) -> _Layout:
    index, valid, sequence = [], [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for a in range(start, end, chunk):
            b = min(a + chunk, end)
            slots = torch.full((chunk,), bounds[-1], dtype=torch.long)
            slots[: b - a] = torch.arange(a, b)
            index.append(slots)
            valid.append(b - a)
            sequence.append(n)
    return _Layout(torch.cat(index).to(device), torch.tensor(valid, device=device), sequence)


def _attend(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    decay: Tensor,
    state_NHDE: Tensor,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """One pass without scale and without autograd. Documents (`bounds`) need B = 1."""
    batch, length, heads, dim = q_BTHD.shape
    if length == 1 and bounds is None:  # a decode step
        keep = torch.exp(-decay)[None, :, None, None]
        state = keep * state_NHDE + k_BTHD[:, 0, :, :, None] * v_BTHE[:, 0, :, None, :]
        return torch.matmul(q_BTHD[:, 0, :, None, :], state).transpose(1, 2), state

    chunk = min(CHUNK, 1 << max(4, (length - 1).bit_length()))
    per_chunk = batch * heads * chunk * chunk
    span = max(1, SEGMENT_ELEMENTS // per_chunk) * chunk
    if bounds is None:
        outputs, state = [], state_NHDE
        for a in range(0, length, span):
            o, state = _segment(
                q_BTHD[:, a : a + span], k_BTHD[:, a : a + span], v_BTHE[:, a : a + span], decay, state, chunk
            )
            outputs.append(o)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), state
    return _documents(q_BTHD, k_BTHD, v_BTHE, decay, state_NHDE, bounds, chunk)


def _segment(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    pad = -length % chunk
    tail = chunk - pad

    def fold(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, M, C, D]
        x = x.transpose(1, 2)
        if pad:
            x = torch.nn.functional.pad(x, (0, 0, 0, pad))
        return x.reshape(batch, heads, -1, chunk, x.shape[-1])

    q_, k_, v_ = fold(q), fold(k), fold(v)
    chunks = q_.shape[2]
    valid = torch.full((chunks,), chunk, device=q.device)
    valid[-1] = tail
    scores = _intra_scores(q_, k_, decay)
    o = scores @ v_
    updates, keeps = _chunk_updates(k_, v_, decay, valid)  # [B, H, M, D, E], [H, M]
    states = []
    for m in range(chunks):
        states.append(state)
        state = keeps[:, m, None, None] * state + updates[:, :, m]
    _add_inter(o, q_, decay, torch.stack(states, 2))
    return o.reshape(batch, heads, chunks * chunk, -1)[:, :, :length].transpose(1, 2), state


def _documents(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, bounds: list[int], chunk: int
) -> tuple[Tensor, Tensor]:
    """Packed documents: every document is cut into its own chunks; the scan restarts at each first chunk."""
    layout = _document_layout(bounds, chunk, q.device)
    heads, per_segment = q.shape[2], max(1, SEGMENT_ELEMENTS // (q.shape[2] * chunk * chunk))
    finals = list(state.unbind(0))  # updated in place of list slots, chunk by chunk
    o_flat = v.new_zeros(q.shape[1] + 1, heads, v.shape[-1])

    def fold(x: Tensor, slots: Tensor) -> Tensor:  # [1, T, H, D] -> [1, H, M, C, D]
        padded = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])
        return padded[slots].view(-1, chunk, *x.shape[2:]).permute(2, 0, 1, 3)[None]

    for a in range(0, len(layout.sequence), per_segment):
        b = min(a + per_segment, len(layout.sequence))
        slots = layout.slots[a * chunk : b * chunk]
        q_, k_, v_ = fold(q, slots), fold(k, slots), fold(v, slots)
        o = _intra_scores(q_, k_, decay) @ v_
        updates, keeps = _chunk_updates(k_, v_, decay, layout.valid[a:b])
        states = []
        for m, n in enumerate(layout.sequence[a:b]):
            states.append(finals[n])
            finals[n] = keeps[:, m, None, None] * finals[n] + updates[0, :, m]
        _add_inter(o, q_, decay, torch.stack(states, 1)[None])
        o_flat[slots] = o[0].permute(1, 2, 0, 3).reshape(-1, heads, v.shape[-1])
    return o_flat[None, :-1], torch.stack(finals)


def _intra_scores(q_: Tensor, k_: Tensor, decay: Tensor) -> Tensor:
    chunk = q_.shape[-2]
    t = torch.arange(chunk, device=q_.device)
    distance = (t[:, None] - t[None, :]).to(decay.dtype)
    mask = torch.where(distance >= 0, _decay_power(decay, distance.clamp(min=0)), 0.0)  # [H, C, C]
    return (q_ @ k_.transpose(-1, -2)).mul_(mask[:, None])


def _chunk_updates(k_: Tensor, v_: Tensor, decay: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk adds to the state, and the factor by which it decays what was there."""
    t = torch.arange(k_.shape[-2], device=k_.device)
    steps = (valid[:, None] - 1 - t[None, :]).clamp(min=0).to(decay.dtype)  # [M, C]; padding keys are 0
    weights = _decay_power(decay, steps)  # [H, M, C]
    return (k_ * weights[..., None]).transpose(-1, -2) @ v_, _decay_power(decay, valid.to(decay.dtype))


def _add_inter(o: Tensor, q_: Tensor, decay: Tensor, states: Tensor) -> None:
    t = torch.arange(1, q_.shape[-2] + 1, device=q_.device).to(decay.dtype)
    reach = _decay_power(decay, t)[:, None, :, None]  # [H, 1, C, 1]
    o += (q_ * reach) @ states


class _ChunkLightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, bounds: list[int] | None
    ) -> tuple[Tensor, Tensor]:
        o, final = _attend(q, k, v, decay, state, bounds)
        ctx.save_for_backward(q, k, v, decay, state)
        ctx.bounds = bounds
        return o, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do, dfinal = grads
        q, k, v, decay, state = ctx.saved_tensors
        run = _ChunkLightning.apply
        dq, _ = run(do, v, k, decay, state.transpose(-1, -2), ctx.bounds)
        # Backwards in time G_s = exp(-decay) G_{s+1} + q_s do_s^T, with exp(-decay) G_T = dfinal.
        grow = torch.exp(decay)[None, :, None, None]
        seed = dfinal * grow
        bounds = ctx.bounds and [ctx.bounds[-1] - b for b in reversed(ctx.bounds)]
        if bounds:
            seed = seed.flip(0)
        q_, k_, v_, do_ = (x.flip(1) for x in (q, k, v, do))
        dv_, last = run(k_, q_, do_, decay, seed, bounds)
        dk_, _ = run(v_, do_, q_, decay, seed.transpose(-1, -2), bounds)
        dstate = last / grow
        if bounds:
            dstate = dstate.flip(0)
        return dq, dk_.flip(1), dv_.flip(1), None, dstate, None


def chunk_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunked form of `naive_lightning_attention`, same arguments; computes in float32 (float64 if given)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    sequences = q.shape[0] if bounds is None else len(bounds) - 1
    if initial_state is None:
        state = torch.zeros(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=compute, device=q.device)
    else:
        state = initial_state.to(compute)
    with outside_autocast(q):
        o, final = _ChunkLightning.apply(
            q.to(compute) * scale, k.to(compute), v.to(compute), decay.to(compute), state, bounds
        )
    return o.to(v.dtype), final
