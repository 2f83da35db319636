# mypy: allow-untyped-defs
"""The Triton kernels of Lightning attention. All tensors are contiguous; launches are in triton.py beside
this file.

A sequence is cut into segments, a segment into chunks. Every segment but the last adds up what its own tokens
leave in the state (`segment_kernel`), a scan over the segments turns that into the state each segment starts
from (`scan_kernel`), and then every segment walks through its chunks with the state in registers
(`output_kernel`).

Direction. The gradient of this recurrence is the same recurrence backwards in time, so REVERSE only changes
how place p
of a segment maps to a token: p tokens behind its start, or p tokens before its end. Everything else works
    with places.
A forward state is the state after the previous token, thus decayed once more before it meets place 0 (SHIFT =
1).
A backward one is handed over already decayed up to place 0 (SHIFT = 0): no division by a decay that may be
    zero.

Letters: N sequences, H heads, S state slots, K width of q and k, V width of v and o, C tokens of a chunk, L
of a segment; KP, VP, ... are the powers of two that hold them, BK and BV the tile of the state that one
program works on.
"""

import triton
import triton.language as tl

from ..triton_common import find_document

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SHAPES = [
    "length",
    "segments",
    "documents",
]  # differ from call to call: no kernel of their own for each kind of number
CUTOFF: tl.constexpr = tl.constexpr(80.0)  # exp(-80) is taken to be zero, as in the chunked PyTorch form


@triton.jit
def _power(rate, steps):
    """exp(-rate * steps) for steps >= 0 (others are taken as 0), its tail cut to zero."""
    exponent = rate * tl.maximum(steps, 0).to(tl.float32)
    return tl.where(exponent > CUTOFF, 0.0, tl.exp2(exponent * -LOG2_E))


@triton.jit
def _segment_of(number, cu, length, segments, documents, L: tl.constexpr, STEPS: tl.constexpr):
    """Of segment `number` of the launch: sequence, place in it, row and bounds of the sequence, its first
    state slot.

    Slot first + i holds the state that segment i + 1 of the sequence starts from; segment 0 starts from the
    initial one.
    Document n's slots begin at cu[n] // L: no two documents meet, and T // L slots hold all.
    """
    if cu is None:
        sequence = number // segments
        return (
            sequence,
            number % segments,
            sequence,
            sequence * 0,
            sequence * 0 + length,
            sequence * (segments - 1),
        )
    else:
        sequence, segment = find_document(cu, number, documents, L, STEPS)
        start = tl.load(cu + sequence).to(tl.int64)
        end = tl.load(cu + sequence + 1).to(tl.int64)
        return sequence, segment, sequence * 0, start, end, start // L


@triton.jit
def _first_token(start, end, place, REVERSE: tl.constexpr):
    """The token at a place of the sequence [start, end)."""
    return end - 1 - place if REVERSE else start + place


@triton.jit(do_not_specialize=_SHAPES)
def segment_kernel(
    k,
    v,
    decay,
    states,
    cu,
    length,
    segments,
    documents,
    update_scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What the tokens of each segment that is not the last leave in the state: states [S, H, K, V]."""
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = (K + BK - 1) // BK * tiles_v
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % H
    number = (program // (tiles * H)).to(tl.int64)
    _, segment, row, start, end, slot = _segment_of(number, cu, length, segments, documents, L, STEPS)
    if (segment + 1) * L >= end - start:
        return
    first = (row * length + _first_token(start, end, segment * L, REVERSE)) * H + head
    step: tl.constexpr = -1 if REVERSE else 1
    rate = tl.load(decay + head)
    # Tokens whose decay up to the segment's end is past the cutoff need not be read: for steep heads
    # that is most.
    skipped = (L - tl.minimum(1.0 / tl.maximum(rate, 1e-20) * CUTOFF, L)).to(tl.int32) // C * C

    places = tl.arange(0, C)
    k_cols = tile // tiles_v * BK + tl.arange(0, BK)
    v_cols = tile % tiles_v * BV + tl.arange(0, BV)
    k += first * K
    v += first * V
    k_cells = (step * H * K * places)[:, None] + k_cols[None, :]
    v_cells = (step * H * V * places)[:, None] + v_cols[None, :]
    weights = _power(rate, C - SHIFT - places) * update_scale
    keep = _power(rate, C)
    state = tl.zeros([BK, BV], tl.float32)
    for done in tl.range(skipped, L, C, num_stages=STAGES):
        at = done * step * H
        kc = tl.load(k + (at * K + k_cells), mask=k_cols[None, :] < K, other=0.0)
        vc = tl.load(v + (at * V + v_cells), mask=v_cols[None, :] < V, other=0.0)
        weighted = (vc * weights[:, None]).to(vc.dtype)
        state = tl.dot(tl.trans(kc), weighted, state * keep, input_precision="ieee")
    out = states + ((slot + segment) * H + head) * K * V + k_cols[:, None] * V + v_cols[None, :]
    tl.store(out, state, mask=(k_cols[:, None] < K) & (v_cols[None, :] < V))


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    states,
    initial,
    decay,
    cu,
    segments,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place: what each segment adds becomes the state the next one starts from. states [S, H, SIZE],
    initial [N, H, SIZE]."""
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % H
    sequence = (program // (tiles * H)).to(tl.int64)
    if cu is None:
        hops = segments - 1
        slot = sequence * hops
    else:
        start = tl.load(cu + sequence).to(tl.int64)
        hops = ((tl.load(cu + sequence + 1) - start + L - 1) // L - 1).to(tl.int32)
        slot = start // L
    if hops <= 0:
        return
    cells = tile * BLOCK + tl.arange(0, BLOCK)
    inside = cells < SIZE
    keep = _power(tl.load(decay + head), L)
    states += (slot * H + head) * SIZE
    added = tl.load(states + cells, mask=inside, other=0.0)
    if initial is None:
        state = tl.zeros([BLOCK], tl.float32)
    else:
        state = tl.load(initial + (sequence * H + head) * SIZE + cells, mask=inside, other=0.0)
    for hop in range(hops):
        behind = tl.where(hop + 1 < hops, H * SIZE, 0)
        following = tl.load(
            states + behind + cells, mask=inside, other=0.0
        )  # on its way while `added` is used
        state = state * keep + added
        tl.store(states + cells, state, mask=inside)
        added = following
        states += H * SIZE


@triton.jit
def _state_product(q, state):
    """q @ state in float32, with the state rounded to q's dtype.

    float16 ends at 65504, which a state may pass: there the state is brought to at most 1 and the product
        back.
    """
    if q.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(state), 1), 0)
        return tl.dot(q, (state / tl.maximum(top, 1e-30)).to(q.dtype), input_precision="ieee") * top
    else:
        return tl.dot(q, state.to(q.dtype), input_precision="ieee")


@triton.jit
def _inside(k_cols, v_cols, wanted, K: tl.constexpr, V: tl.constexpr):
    """The cells of a tile that lie in a state [K, V], or none unless `wanted`, which is one value."""
    return (k_cols[:, None] < tl.where(wanted, K, 0)) & (v_cols[None, :] < V)


@triton.jit(do_not_specialize=_SHAPES)
def output_kernel(
    q,
    k,
    v,
    o,
    decay,
    initial,
    states,
    final,
    cu,
    length,
    segments,
    documents,
    score_scale,
    state_scale,
    update_scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o [N, T, H, V] from q, k, v and the state each segment starts from; the last segment writes the final
    state.

    o_p = score_scale * sum_{r <= p} decay^(p-r) (q_p . k_r) v_r + state_scale * decay^(p+SHIFT) q_p state.
    The update of the state carries update_scale. States are [.., K, V], or with TRANSPOSED [.., V, K].
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    tile = program % tiles  # neighbours read the same q and k: they find them in the cache
    head = program // tiles % H
    number = (program // (tiles * H)).to(tl.int64)
    sequence, segment, row, start, end, slot = _segment_of(number, cu, length, segments, documents, L, STEPS)
    count = tl.minimum(end - start - segment * L, L).to(tl.int32)
    if (segment > 0) & (count <= 0):
        return
    first = (row * length + _first_token(start, end, segment * L, REVERSE)) * H + head
    step: tl.constexpr = -1 if REVERSE else 1
    rate = tl.load(decay + head)

    places = tl.arange(0, C)
    k_cols = tl.arange(0, KP)
    v_cols = tile * BV + tl.arange(0, BV)
    # 64 bits say where the segment lies, 32 where a token lies in it: a table of 64-bit addresses would
    # fill the registers.
    q += first * K
    k += first * K
    v += first * V
    o += first * V
    k_cells = (step * H * K * places)[:, None] + k_cols[None, :]
    v_cells = (step * H * V * places)[:, None] + v_cols[None, :]

    cells = k_cols[:, None] + v_cols[None, :] * K if TRANSPOSED else k_cols[:, None] * V + v_cols[None, :]
    state = tl.zeros([KP, BV], tl.float32)
    if states is not None:
        entry = ((slot + segment - 1) * H + head) * K * V
        state += tl.load(states + entry + cells, mask=_inside(k_cols, v_cols, segment > 0, K, V), other=0.0)
    if initial is not None:
        entry = (sequence * H + head) * K * V
        state += tl.load(initial + entry + cells, mask=_inside(k_cols, v_cols, segment == 0, K, V), other=0.0)

    apart = places[:, None] - places[None, :]
    causal = tl.where(apart >= 0, _power(rate, apart), 0.0) * score_scale
    reach = _power(rate, places + SHIFT) * state_scale
    for done in tl.range(0, count, C, num_stages=STAGES):
        live = places < count - done
        k_mask = live[:, None] if K == KP else live[:, None] & (k_cols[None, :] < K)
        v_mask = live[:, None] if V % BV == 0 else live[:, None] & (v_cols[None, :] < V)
        at = done * step * H
        qc = tl.load(q + (at * K + k_cells), mask=k_mask, other=0.0)
        kc = tl.load(k + (at * K + k_cells), mask=k_mask, other=0.0)
        vc = tl.load(v + (at * V + v_cells), mask=v_mask, other=0.0)
        valid = tl.minimum(count - done, C)
        weighted = (vc * (_power(rate, valid - SHIFT - places) * update_scale)[:, None]).to(vc.dtype)
        scores = tl.dot(qc, tl.trans(kc), input_precision="ieee") * causal
        out = _state_product(qc, state) * reach[:, None]
        out = tl.dot(scores.to(vc.dtype), vc, out, input_precision="ieee")
        tl.store(o + (at * V + v_cells), out.to(o.dtype.element_ty), mask=v_mask)
        state = tl.dot(tl.trans(kc), weighted, state * _power(rate, valid), input_precision="ieee")
    if final is not None:
        last = (segment + 1) * L >= end - start
        tl.store(
            final + (sequence * H + head) * K * V + cells, state, mask=_inside(k_cols, v_cols, last, K, V)
        )


@triton.jit
def step_kernel(
    q,
    k,
    v,
    o,
    decay,
    initial,
    final,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
):
    """One token of each sequence: the state is read once and written once. q, k [N, H, K], v, o [N, H, V]."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64)  # of N * H
    k_cols = tl.arange(0, KP)
    v_cols = tile * BV + tl.arange(0, BV)
    qc = tl.load(q + row * K + k_cols, mask=k_cols < K, other=0.0).to(tl.float32)
    kc = tl.load(k + row * K + k_cols, mask=k_cols < K, other=0.0).to(tl.float32)
    vc = tl.load(v + row * V + v_cols, mask=v_cols < V, other=0.0).to(tl.float32)
    inside = (k_cols[:, None] < K) & (v_cols[None, :] < V)
    cells = row * K * V + k_cols[:, None] * V + v_cols[None, :]
    state = kc[:, None] * vc[None, :]
    if initial is not None:
        state += tl.load(initial + cells, mask=inside, other=0.0) * _power(tl.load(decay + row % H), 1)
    tl.store(final + cells, state, mask=inside)
    out = tl.sum(qc[:, None] * state, 0) * scale
    tl.store(o + row * V + v_cols, out.to(o.dtype.element_ty), mask=v_cols < V)
