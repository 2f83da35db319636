# mypy: allow-untyped-defs
"""Lightning attention over slots in Triton, for the next few tokens of many sequences: one launch.

A program holds a tile of columns of one head's state in registers while it walks through the tokens of one
sequence, so a state is read once and written once, in place. That is decoding, and the verification of a
draft. Tokens go one after the other, so a long call is left to the chunked kernels (`triton.py`), between a
gather and a scatter of the states.

Which of the two runs follows from shapes: with T tokens of N sequences, none of which is empty, the longest
sequence has at most T - N + 1 tokens.

Letters: N sequences, H heads, K width of q and k, V width of v and o; KP holds K, BV columns of V a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCase, CompileCases, cdiv, computable, on_device, padded
from .slots import gather_lightning_slots
from .triton import triton_lightning_attention
from .triton_kernels import _power

LONGEST = 64  # tokens that one program walks through at most: one chunk of the other kernels


@triton.jit
def slots_kernel(
    q, k, v, o, decay, states, cu, read, write, scale, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o `[T, H, V]` and, in place, states `[slots, H, K, V]`: a tile of columns of one sequence and head."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % H
    sequence = tl.program_id(0) // (tiles * H)
    start = tl.load(cu + sequence).to(tl.int64)
    count = (tl.load(cu + sequence + 1) - start).to(tl.int32)
    source = tl.load(read + sequence).to(tl.int64)
    target = tl.load(write + sequence).to(tl.int64)
    keep = _power(tl.load(decay + head), 1)
    k_cols = tl.arange(0, KP)
    v_cols = tile * BV + tl.arange(0, BV)
    cells = head * (K * V) + k_cols[:, None] * V + v_cols[None, :]
    inside = (k_cols[:, None] < K) & (v_cols[None, :] < V)
    there = (k_cols[:, None] < tl.where(source >= 0, K, 0)) & (v_cols[None, :] < V)
    state = tl.load(states + source * (H * K * V) + cells, mask=there, other=0.0)
    q += (start * H + head) * K
    k += (start * H + head) * K
    v += (start * H + head) * V
    o += (start * H + head) * V
    for t in range(count):
        qc = tl.load(q + t * (H * K) + k_cols, mask=k_cols < K, other=0.0).to(tl.float32)
        kc = tl.load(k + t * (H * K) + k_cols, mask=k_cols < K, other=0.0).to(tl.float32)
        vc = tl.load(v + t * (H * V) + v_cols, mask=v_cols < V, other=0.0).to(tl.float32)
        state = state * keep + kc[:, None] * vc[None, :]
        out = tl.sum(qc[:, None] * state, 0) * scale
        tl.store(o + t * (H * V) + v_cols, out.to(o.dtype.element_ty), mask=v_cols < V)
    tl.store(states + target * (H * K * V) + cells, state, mask=inside)


def _config(dim: int, value_dim: int) -> dict[str, int]:
    """A tile of the state takes 16 registers of a thread, 32 for the widest heads."""
    return {"KP": padded(dim), "BV": min(padded(value_dim), 32), "num_warps": 8}


def triton_lightning_slots(
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
    """See `lightning_attention_slots`. Nothing waits for the GPU; q, k and v may differ in dtype."""
    sequences, (tokens, heads, dim), value_dim = len(read_slots), q.shape, v.shape[2]
    cu, read, write = (x.to(q.device).contiguous() for x in (cu_seqlens, read_slots, write_slots))
    if tokens - sequences >= LONGEST:
        run = triton_lightning_attention
        return gather_lightning_slots(q, k, v, decay, states, cu, read, write, scale, run)
    queries, keys, values = (computable(x.detach()).contiguous() for x in (q, k, v))
    o = torch.empty_like(values)
    config = _config(dim, value_dim)
    with on_device(q):
        slots_kernel[(sequences * heads * cdiv(value_dim, config["BV"]),)](
            queries, keys, values, o, decay.to(q.device, torch.float32).contiguous(), states, cu, read,
            write, float(scale), H=heads, K=dim, V=value_dim, **config,
        )  # fmt: skip
    return o.to(v.dtype)


def compile_cases(arch: int) -> CompileCases:
    """The released heads with q and k in bfloat16 and in float32, and the widest ones."""
    for name, dim, kinds in (
        ("released", 128, ("bf16",) * 3),
        ("released float", 128, ("fp32", "fp32", "bf16")),
        ("wide", 256, ("fp16",) * 3),
    ):
        config = _config(dim, dim)
        options = {"num_warps": config.pop("num_warps")}
        types = {
            **dict(zip("qkv", (f"*{kind}" for kind in kinds), strict=True)),
            "o": f"*{kinds[2]}",
            **dict.fromkeys(("decay", "states"), "*fp32"),
            **dict.fromkeys(("cu", "read", "write"), "*i32"),
            "scale": "fp32",
        }
        constants = {"H": 32, "K": dim, "V": dim, **config}
        yield CompileCase(f"slots {name}", slots_kernel, types, constants, options)
