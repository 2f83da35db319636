"""Norm + rotary positions and norm + gate in Triton: one pass over memory, one launch each way (see
triton_kernels.py)."""

from typing import Any

import torch
from torch import Tensor

from ..backends import triton_interpreted
from ..triton_common import CompileCase, CompileCases, cdiv, computable, on_device
from .triton_kernels import (
    norm_gate_grad_kernel,
    norm_gate_kernel,
    norm_rope_grad_kernel,
    norm_rope_kernel,
    silu_mul_flat_kernel,
    silu_mul_grad_kernel,
)

ROPE_TILE, GATE_TILE = 4096, 8192  # bytes of x that a program holds at a time
ELEMENTS = 1024  # that a program of an elementwise kernel takes
PROGRAMS = 512  # of a backward launch: about four for each multiprocessor of an H200


def _rope_config(dim: int, item: int) -> dict[str, int]:
    half = cdiv(dim, 2)
    columns = 1 << (half - 1).bit_length()
    return {
        "D": dim,
        "HALF": half,
        "COLS": columns,
        "ROWS": max(1, ROPE_TILE // item // (2 * columns)),
        "num_warps": 4,
    }


def _gate_config(width: int, item: int) -> dict[str, int]:
    columns = (
        1 << (width - 1).bit_length()
    )  # past 8192 the backward kernel spills some 200 bytes a thread: still right
    return {
        "W": width,
        "COLS": columns,
        "ROWS": max(1, GATE_TILE // item // columns),
        "num_warps": min(32, max(4, columns // 512)),
    }


def _storable(dtype: torch.dtype) -> torch.dtype:
    """What kernels write for this dtype: the interpreter rounds to bfloat16 wrongly, there they write
    float32."""
    return torch.float32 if dtype == torch.bfloat16 and triton_interpreted() else dtype


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty_like(x, dtype=dtype)
        config = _rope_config(x.shape[-1], x.element_size())
        arguments = _rope_arguments(x, cos)
        norm_rope_kernel[(cdiv(arguments["rows"], config["ROWS"]),)](
            x, weight, cos, sin, out, eps=eps, **arguments, **config
        )
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        config = _rope_config(x.shape[-1], x.element_size())
        arguments = _rope_arguments(x, cos)
        programs = min(PROGRAMS, cdiv(arguments["rows"], config["ROWS"]))
        dx = torch.empty_like(x)
        partial = None if weight is None else x.new_empty(programs, x.shape[-1], dtype=torch.float32)
        with on_device(x):
            norm_rope_grad_kernel[(programs,)](
                x, weight, cos, sin, grads[0].contiguous(), dx, partial, eps=ctx.eps, **arguments, **config
            )
        return dx, _total(partial, weight), None, None, None, None


def _rope_arguments(x: Tensor, cos: Tensor | None) -> dict[str, int | bool]:
    batch, length, heads, _ = x.shape
    repeated = cos is not None and cos.shape[0] < batch
    return {"rows": batch * length * heads, "table_rows": length, "H": heads, "REPEATED": repeated}


def _gated(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_row: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The result for contiguous x in a dtype; rows of the gate begin `gate_row` elements apart."""
    out = torch.empty_like(x, dtype=dtype)
    config = _gate_config(x.shape[-1], x.element_size())
    rows = x.numel() // x.shape[-1]
    norm_gate_kernel[(cdiv(rows, config["ROWS"]),)](x, weight, gate, out, rows, gate_row, eps, **config)
    return out


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        out = _gated(x, weight, gate, x.shape[-1], eps, dtype)
        ctx.save_for_backward(x, weight, gate)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        config = _gate_config(x.shape[-1], x.element_size())
        rows = x.numel() // x.shape[-1]
        programs = min(PROGRAMS, cdiv(rows, config["ROWS"]))
        dx = torch.empty_like(x)
        dgate = None if gate is None else torch.empty_like(gate)
        partial = None if weight is None else x.new_empty(programs, x.shape[-1], dtype=torch.float32)
        with on_device(x):
            norm_gate_grad_kernel[(programs,)](
                x, weight, gate, grads[0].contiguous(), dx, partial, dgate, rows, ctx.eps, **config
            )
        return dx, _total(partial, weight), dgate, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        grid = (cdiv(gate.numel(), ELEMENTS),)
        silu_mul_flat_kernel[grid](gate, up, out, gate.numel(), BLOCK=ELEMENTS, num_warps=4)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        grid = (cdiv(gate.numel(), ELEMENTS),)
        with on_device(gate):
            silu_mul_grad_kernel[grid](
                gate, up, grads[0].contiguous(), dgate, dup, gate.numel(), BLOCK=ELEMENTS, num_warps=4
            )
        return dgate, dup


def _total(partial: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return None if partial is None or weight is None else partial.sum(0).to(weight.dtype)


def _ready(x: Tensor | None) -> Tensor | None:
    return None if x is None else computable(x).contiguous()


def triton_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `norm_rope`; gradients flow to x and weight, once."""
    with on_device(x):
        return _NormRope.apply(
            _ready(x), _ready(weight), _ready(cos), _ready(sin), eps, _storable(out_dtype)
        ).to(out_dtype)


def triton_norm_gate(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """See `norm_gate`; gradients flow to x, weight and gate, once. Without them, the gate may be part of
    wider rows."""
    stored = _storable(out_dtype)
    with on_device(x):
        if not torch.is_grad_enabled() and gate is not None:
            rows = computable(gate)
            rows = rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])
            rows = rows if rows.stride(-1) == 1 else rows.contiguous()
            plain = computable(x).contiguous()
            return _gated(plain, _ready(weight), rows, rows.stride(0), eps, stored).to(out_dtype)
        return _NormGate.apply(_ready(x), _ready(weight), _ready(gate), eps, stored).to(out_dtype)


def triton_silu_mul_learning(gate: Tensor, up: Tensor) -> Tensor:
    """See `silu_mul`; gradients flow to both, once."""
    with on_device(gate):
        return _SiluMul.apply(_ready(gate), _ready(up.to(gate.dtype))).to(gate.dtype)


def compile_cases(arch: int) -> CompileCases:
    """The released shapes in bf16, and narrow float32 ones with a table of angles for all batches."""
    for name, x, heads, dim, repeated in (
        ("32 x 128 bf16", "*bf16", 32, 128, False),
        ("8 x 64 fp32", "*fp32", 8, 64, True),
    ):
        config = _rope_config(dim, 2 if x == "*bf16" else 4)
        options = {"num_warps": config.pop("num_warps")}
        config.update(H=heads, REPEATED=repeated)
        types = {
            "x": x,
            "weight": x,
            "cos": "*fp32",
            "sin": "*fp32",
            "rows": "i32",
            "table_rows": "i32",
            "eps": "fp32",
        }
        yield CompileCase(f"norm_rope {name}", norm_rope_kernel, {**types, "out": x}, config, options)
        yield CompileCase(
            f"norm_rope grad {name}",
            norm_rope_grad_kernel,
            {**types, "grad": x, "dx": x, "dweight": "*fp32"},
            config,
            options,
        )
    for name, x, width in (
        ("4096 bf16", "*bf16", 4096),
        ("512 fp32", "*fp32", 512),
        ("8192 bf16", "*bf16", 8192),
    ):
        config = _gate_config(width, 2 if x == "*bf16" else 4)
        options = {"num_warps": config.pop("num_warps")}
        types = {"x": x, "weight": x, "gate": x, "rows": "i32", "eps": "fp32"}
        forward = {**types, "out": x, "gate_row": "i32"}
        yield CompileCase(f"norm_gate {name}", norm_gate_kernel, forward, config, options)
        if name == "4096 bf16":  # sparse layers have a gate and no norm
            plain = {key: kind for key, kind in forward.items() if key != "weight"}
            constants = {**config, "weight": None}
            yield CompileCase(f"norm_gate {name} plain", norm_gate_kernel, plain, constants, options)
        yield CompileCase(
            f"norm_gate grad {name}",
            norm_gate_grad_kernel,
            {**types, "grad": x, "dx": x, "dgate": x, "dweight": "*fp32"},
            config,
            options,
        )
    elementwise = dict.fromkeys(("gate", "up", "out"), "*bf16")
    block, options = {"BLOCK": ELEMENTS}, {"num_warps": 4}
    yield CompileCase(
        "silu_mul bf16", silu_mul_flat_kernel, {**elementwise, "elements": "i32"}, block, options
    )
    grads = dict.fromkeys(("gate", "up", "grad", "dgate", "dup"), "*bf16")
    yield CompileCase(
        "silu_mul grad bf16", silu_mul_grad_kernel, {**grads, "elements": "i32"}, block, options
    )
