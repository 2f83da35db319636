"""Lightning attention in Triton: three launches for a long sequence, one for a short one or for a decode
step.

Traffic decides here: with 32 heads of 128 in bf16, q, k, v and o are 1 KB a token and head, while a float32
state is 64 KB. A state for every chunk of 64 tokens would double the traffic, and one program walking through
a whole sequence would leave most of the GPU idle. So states are kept only between segments of some thousand
tokens (at 128K tokens:
4096, 32 segments x 32 heads x 2 tiles = 2048 programs), and a segment's program walks through its chunks with
the state in registers. The price is that k and v are read twice, 1.5 times the floor; but the first reading
stops where the decay has passed exp(-80), which with ALiBi slopes leaves about half of it. Chunks of 64: the
products inside a chunk then cost less than those with the state, and 64 rows are what one warp group
multiplies on Hopper.

In the backward pass each gradient is the same recurrence with other roles (triton_kernels.py), two of them
backwards in time; states of segments are computed again, not kept. Nothing of size T x C or T x D x Dv
exists.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import (
    CompileCase,
    CompileCases,
    arch_of,
    cdiv,
    computable,
    on_device,
    padded,
    search_steps,
)
from .triton_kernels import output_kernel, scan_kernel, segment_kernel, step_kernel

SEGMENTS = (512, 16384)  # shortest and longest segment, in tokens
PROGRAMS = 2048  # that a launch should have: about 8 for each place on an H200
SCAN_BLOCK = 512
STEP_TILE = 32


def _output_config(dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> dict[str, int]:
    """Tile and pipeline of `output_kernel`, by compilation: the largest that fit the registers without
    spilling."""
    rows, wide = padded(dim), padded(value_dim)
    if (
        dtype == torch.float32 and not triton_interpreted()
    ):  # no tensor cores: both operands pass through registers
        return {"KP": rows, "BV": 16, "C": 16, "STAGES": 1, "num_warps": max(4, rows // 16)}
    if arch == 90:  # two programs share a multiprocessor: one loads while the other computes
        tile = {256: 16, 128: 64 if dtype == torch.bfloat16 and dim == rows else 32}.get(rows, 64)
        return {"KP": rows, "BV": min(wide, tile), "C": 64, "STAGES": 3 if rows <= 64 else 2, "num_warps": 4}
    narrow = 32 if dtype == torch.bfloat16 or rows < 128 else 16
    few = rows == 256
    return {
        "KP": rows,
        "BV": min(wide, narrow),
        "C": 32,
        "STAGES": 2 if few else 3,
        "num_warps": 8 if few else 4,
    }


def _segment_config(dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> dict[str, int]:
    """The same for `segment_kernel`."""
    if dtype == torch.float32 and not triton_interpreted():
        return {
            "BK": min(padded(dim), 64),
            "BV": min(padded(value_dim), 64),
            "C": 32,
            "STAGES": 1,
            "num_warps": 4,
        }
    side = min(128 if arch == 90 else 64, padded(dim))
    return {
        "BK": side,
        "BV": min(side, padded(value_dim)),
        "C": 64,
        "STAGES": 3,
        "num_warps": 8 if side == 128 else 4,
    }


class _Plan(NamedTuple):
    """How one call is cut: the same for all launches of its forward and backward pass."""

    rows: int  # B
    length: int  # T
    heads: int
    segment: int  # tokens of a segment
    cu: Tensor | None  # [N + 1] boundaries of documents
    sequences: int  # N

    @property
    def segments(self) -> int:
        """Segments of each row, if rows are sequences."""
        return max(1, cdiv(self.length, self.segment))

    @property
    def slots(self) -> int:
        """States between segments: one for each segment that is not the last of its sequence, or a few
        more."""
        return self.rows * (self.segments - 1) if self.cu is None else self.length // self.segment

    @property
    def numbers(self) -> int:
        """Segments to launch; with documents an upper bound, as their lengths are known on the device
        only."""
        return self.rows * self.segments if self.cu is None else self.length // self.segment + self.sequences

    def arguments(self) -> dict[str, Any]:
        return {
            "cu": self.cu,
            "length": self.length,
            "segments": self.segments,
            "documents": self.sequences,
            "H": self.heads,
            "L": self.segment,
            "STEPS": search_steps(self.sequences),
        }


def _plan(q: Tensor, v: Tensor, cu: Tensor | None) -> _Plan:
    rows, length, heads, dim = q.shape
    tiles = cdiv(v.shape[-1], 64)
    shortest, longest = SEGMENTS
    segment = shortest
    while segment < longest and segment * PROGRAMS < rows * length * heads * tiles:
        segment *= 2
    assert segment * heads * max(dim, v.shape[-1]) < 2**31, "places in a segment are counted in 32 bits"
    return _Plan(rows, length, heads, segment, cu, rows if cu is None else len(cu) - 1)


def _states(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    plan: _Plan,
    *,
    reverse: bool,
    update_scale: float,
) -> Tensor | None:
    """The state that each segment but the first of its sequence starts from, [slots, H, K, V]; None if there
    are none."""
    if plan.slots == 0:
        return None
    dim, value_dim = k.shape[-1], v.shape[-1]
    states = k.new_empty(plan.slots, plan.heads, dim, value_dim, dtype=torch.float32)
    config = _segment_config(dim, value_dim, k.dtype, arch_of(k.device))
    tiles = cdiv(dim, config["BK"]) * cdiv(value_dim, config["BV"])
    segment_kernel[(plan.numbers * plan.heads * tiles,)](
        k,
        v,
        decay,
        states,
        update_scale=update_scale,
        K=dim,
        V=value_dim,
        REVERSE=reverse,
        SHIFT=1 - reverse,
        **plan.arguments(),
        **config,
    )
    size = dim * value_dim
    scan_kernel[(cdiv(size, SCAN_BLOCK) * plan.heads * plan.sequences,)](
        states,
        initial,
        decay,
        plan.cu,
        plan.segments,
        H=plan.heads,
        SIZE=size,
        L=plan.segment,
        BLOCK=SCAN_BLOCK,
        num_warps=4,
    )
    return states


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    states: Tensor | None,
    final: Tensor | None,
    plan: _Plan,
    *,
    scales: tuple[float, float, float],
    reverse: bool = False,
    transposed: bool = False,
) -> Tensor:
    """o [B, T, H, V] from the states of `_states`; the final states go into `final`. See `output_kernel`."""
    dim, value_dim = k.shape[-1], v.shape[-1]
    o = torch.empty_like(v)
    config = _output_config(dim, value_dim, q.dtype, arch_of(q.device))
    output_kernel[(plan.numbers * plan.heads * cdiv(value_dim, config["BV"]),)](
        q,
        k,
        v,
        o,
        decay,
        initial,
        states,
        final,
        score_scale=scales[0],
        state_scale=scales[1],
        update_scale=scales[2],
        K=dim,
        V=value_dim,
        REVERSE=reverse,
        SHIFT=1 - reverse,
        TRANSPOSED=transposed,
        **plan.arguments(),
        **config,
    )
    return o


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial: Tensor | None, plan: _Plan, scale: float
) -> tuple[Tensor, Tensor]:
    final = q.new_empty(plan.sequences, plan.heads, q.shape[-1], v.shape[-1], dtype=torch.float32)
    if plan.length == 1 and plan.cu is None:
        return _step(q, k, v, decay, initial, final, scale), final
    states = _states(k, v, decay, initial, plan, reverse=False, update_scale=1.0)
    return _outputs(q, k, v, decay, initial, states, final, plan, scales=(scale, scale, 1.0)), final


def _step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial: Tensor | None, final: Tensor, scale: float
) -> Tensor:
    dim, value_dim = q.shape[-1], v.shape[-1]
    o = torch.empty_like(v)
    tile = min(padded(value_dim), STEP_TILE)
    step_kernel[(q.shape[0] * q.shape[2] * cdiv(value_dim, tile),)](
        q,
        k,
        v,
        o,
        decay,
        initial,
        final,
        scale,
        H=q.shape[2],
        K=dim,
        V=value_dim,
        KP=padded(dim),
        BV=tile,
        num_warps=4,
    )
    return o


class _TritonLightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        initial: Tensor | None,
        plan: _Plan,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, decay, initial)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return _forward(q, k, v, decay, initial, plan, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, initial = ctx.saved_tensors
        do = torch.zeros_like(v) if grads[0] is None else grads[0].to(v.dtype).contiguous()
        dfinal = None if grads[1] is None else grads[1].contiguous()
        wants_q, wants_k, wants_v, _, wants_initial, *_ = ctx.needs_input_grad
        with on_device(q):
            return (
                *_gradients(
                    q,
                    k,
                    v,
                    do,
                    decay,
                    initial,
                    dfinal,
                    ctx.plan,
                    ctx.scale,
                    wants_q,
                    wants_k,
                    wants_v,
                    wants_initial,
                ),
                None,
                None,
            )


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    dfinal: Tensor | None,
    plan: _Plan,
    scale: float,
    wants_q: bool,
    wants_k: bool,
    wants_v: bool,
    wants_initial: bool,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, None for the decay, and the gradient of the initial state.

    With S the states of the forward pass and G_t = exp(-decay) G_{t+1} + scale q_t do_t^T, which ends in
    dfinal:
    dq_t = scale S_t do_t, dk_t = G_t v_t, dv_t = G_t^T k_t, and the initial state gets exp(-decay) G_0.
    """
    dq = dk = dv = dinitial = None
    if wants_q:
        states = _states(k, v, decay, initial, plan, reverse=False, update_scale=1.0)
        dq = _outputs(
            do, v, k, decay, initial, states, None, plan, scales=(scale, scale, 1.0), transposed=True
        )
    if wants_k or wants_v or wants_initial:
        states = _states(q, do, decay, dfinal, plan, reverse=True, update_scale=scale)
        scales = (scale, 1.0, scale)
        if wants_v or wants_initial:
            dinitial = torch.empty_like(initial) if wants_initial and initial is not None else None
            dv = _outputs(k, q, do, decay, dfinal, states, dinitial, plan, scales=scales, reverse=True)
        if wants_k:
            dk = _outputs(
                v, do, q, decay, dfinal, states, None, plan, scales=scales, reverse=True, transposed=True
            )
    return dq, dk, dv, None, dinitial


def triton_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive_lightning_attention` on a GPU, same arguments. Sums are float32, factors keep the inputs' dtype.

    Nothing waits for the GPU. One token without `cu_seqlens` is one launch, which a CUDA graph may capture.
    Gradients flow to q, k, v and initial_state, once (the backward pass has none of its own).
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q_, k_, v_ = (computable(x.to(dtype)).contiguous() for x in (q, k, v))
    decay = decay.detach().to(q.device, torch.float32).contiguous()
    initial = None if initial_state is None else initial_state.float().contiguous()
    cu = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
    plan = _plan(q_, v_, cu)
    with on_device(q):
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, initial_state)
        ):
            o, final = _TritonLightning.apply(q_, k_, v_, decay, initial, plan, float(scale))
        else:
            o, final = _forward(q_, k_, v_, decay, initial, plan, float(scale))
    return o.to(v.dtype), final


# head dim, value dim, dtype, backward, dtype of the boundaries of packed sequences (training's are int64, the
# engine's int32)
_CASES: tuple[tuple[int, int, torch.dtype, bool, str], ...] = (
    (128, 128, torch.bfloat16, False, ""),
    (128, 128, torch.bfloat16, False, "*i32"),
    (128, 128, torch.bfloat16, True, "*i64"),
    (64, 64, torch.bfloat16, False, ""),
    (128, 128, torch.float32, False, ""),
)
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_cases(arch: int) -> CompileCases:
    """Forward and backward of the released heads (32 x 128), smaller ones, float32; packed sequences, and
    those of at most one segment, which have no states between."""
    for dim, value_dim, dtype, backward, boundaries in _CASES:
        name = f"{dim} {_TYPE_NAMES[dtype]}{' backward' * backward}{' packed' * bool(boundaries)}"
        x, f = f"*{_TYPE_NAMES[dtype]}", "*fp32"
        shapes = {"length": "i32", "segments": "i32", "documents": "i32"}
        common = {
            "H": 32,
            "K": dim,
            "V": value_dim,
            "L": 4096,
            "REVERSE": backward,
            "SHIFT": 1 - backward,
            "STEPS": 3,
        }
        cu = {"cu": boundaries} if boundaries else {}
        absent = {} if boundaries else {"cu": None}
        config = _output_config(dim, value_dim, dtype, arch)
        types = {
            **dict.fromkeys("qkvo", x),
            **dict.fromkeys(("decay", "initial", "states", "final"), f),
            **shapes,
            **cu,
            **dict.fromkeys(("score_scale", "state_scale", "update_scale"), "fp32"),
        }
        constants = {**common, **absent, "TRANSPOSED": backward, **_without_warps(config)}
        options = {"num_warps": config["num_warps"]}
        yield CompileCase(f"output {name}", output_kernel, types, constants, options)
        if boundaries == "*i32":
            short = {n: kind for n, kind in types.items() if n != "states"}
            constants = {**constants, "states": None}
            yield CompileCase(f"output {name} short", output_kernel, short, constants, options)
        config = _segment_config(dim, value_dim, dtype, arch)
        yield CompileCase(
            f"segment {name}",
            segment_kernel,
            {"k": x, "v": x, "decay": f, "states": f, "update_scale": "fp32", **shapes, **cu},
            {**common, **absent, **_without_warps(config)},
            {"num_warps": config["num_warps"]},
        )
    types = {**dict.fromkeys(("states", "initial", "decay"), "*fp32"), "segments": "i32"}
    constants = {"H": 32, "SIZE": 128 * 128, "L": 4096, "BLOCK": SCAN_BLOCK}
    yield CompileCase("scan", scan_kernel, types, {**constants, "cu": None}, {"num_warps": 4})
    yield CompileCase("scan packed", scan_kernel, {**types, "cu": "*i32"}, constants, {"num_warps": 4})
    yield CompileCase(
        "step",
        step_kernel,
        {
            **dict.fromkeys("qkvo", "*bf16"),
            "scale": "fp32",
            **dict.fromkeys(("decay", "initial", "final"), "*fp32"),
        },
        {"H": 32, "K": 128, "V": 128, "KP": 128, "BV": STEP_TILE},
        {"num_warps": 4},
    )


def _without_warps(config: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in config.items() if name != "num_warps"}
