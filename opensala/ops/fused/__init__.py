"""The elementwise steps around the attentions, each in one pass over memory: norm + rotary positions, norm +
gate."""

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from ..checks import head_dim_limit
from .cpp import cpp_add_rms_norm, cpp_add_scaled, cpp_norm_gate, cpp_norm_rope, cpp_rms_norm, cpp_silu_mul
from .naive import (
    naive_add_rms_norm,
    naive_add_scaled,
    naive_norm_gate,
    naive_norm_rope,
    naive_rms_norm,
    naive_silu_mul,
)
from .plain import (
    plain_add_rms_norm,
    plain_add_scaled,
    plain_norm_gate,
    plain_norm_rope,
    plain_rms_norm,
    plain_silu_mul,
)

__all__ = ["add_rms_norm", "add_scaled", "norm_gate", "norm_rope", "rms_norm", "silu_mul", "split_heads"]

WIDEST = 16384  # elements of a row that one Triton program holds


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """RMSNorm over each head, then rotary positions in the half-rotation form; either may be left out.

    Args:
        x (Tensor): `[B, T, H, D]`; D even if there are angles.
        weight (Tensor): `[D]`, or None for no norm.
        cos, sin (Tensor): `[B, T, D / 2]` or `[1, T, D / 2]`, float32, or None for no rotation.
        eps: added to the mean square.
        out_dtype: x's dtype if None. The work is done in float32 (float64 for float64) whatever comes in and
            goes out.

    Returns:
        `[B, T, H, D]`. Gradients flow to x and weight.

    Raises:
        ValueError: shapes that do not fit together, or an unavailable backend.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1 (QK-norm, HyPE).
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], as wide as a head of x; got {list(weight.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (
            table.shape[-2:] != (x.shape[1], x.shape[3] / 2) or table.shape[0] not in (1, x.shape[0])
        ):
            raise ValueError(f"{name} must be [B, T, D / 2] for x {list(x.shape)}, got {list(table.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together")
    name = choose_backend("norm_rope", x, backend, {"cpp": None, "triton": head_dim_limit(x)})
    if name == "triton":
        from .triton import triton_norm_rope

        return triton_norm_rope(x, weight, cos, sin, eps, out_dtype or x.dtype)
    if name == "cpp":
        return cpp_norm_rope(x, weight, cos, sin, eps, out_dtype or x.dtype)
    run = {"naive": naive_norm_rope, "torch": plain_norm_rope}[name]
    return run(x, weight, cos, sin, eps).to(out_dtype or x.dtype)


def norm_gate(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """RMSNorm over the last dimension, times sigmoid(gate); either may be left out.

    Args:
        x (Tensor): `[..., W]`.
        weight (Tensor): `[W]`, or None for no norm.
        gate (Tensor): logits of the gate, shaped like x, or None.
        eps: added to the mean square.
        out_dtype: x's dtype if None.

    Returns:
        x's shape; computed in float32 (float64 for float64). Gradients flow to x, weight and gate.

    Raises:
        ValueError: shapes that do not fit together, or an unavailable backend.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1 (output gate; output norm of the Lightning layers).
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], as wide as x; got {list(weight.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {list(x.shape)}, got {list(gate.shape)}")
    limit = f"rows of {x.shape[-1]} are above {WIDEST}" if x.shape[-1] > WIDEST else None
    name = choose_backend("norm_gate", x, backend, {"cpp": None, "triton": limit})
    if name == "triton":
        from .triton import triton_norm_gate

        return triton_norm_gate(x, weight, gate, eps, out_dtype or x.dtype)
    if name == "cpp":
        return cpp_norm_gate(x, weight, gate, eps, out_dtype or x.dtype)
    run = {"naive": naive_norm_gate, "torch": plain_norm_gate}[name]
    return run(x, weight, gate, eps).to(out_dtype or x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend | None = None) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x (Tensor): `[..., W]`.
        weight (Tensor): `[W]`.
        eps: added to the mean square.

    Returns:
        x's shape and dtype; computed in float32 (float64 for float64). Gradients flow to x and weight. With
        `cpp` the bits of a row do not depend on the other rows (so for all ops of this module).

    Raises:
        ValueError: a weight that does not fit, or an unavailable backend.

    Source: arXiv 1910.07467, equation 4.
    """
    _check_weight(x, weight)
    name = choose_backend("rms_norm", x, backend, {"cpp": None, "triton": _beyond_triton(x, weight)})
    if name == "triton":
        from .triton_inference import triton_add_norm

        return triton_add_norm(x, None, 1.0, weight, eps)[1]
    run = {"naive": naive_rms_norm, "torch": plain_rms_norm, "cpp": cpp_rms_norm}[name]
    return run(x, weight, eps).to(x.dtype)


def add_rms_norm(
    x: Tensor,
    y: Tensor,
    scale: float,
    weight: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """x + scale * y, and the RMSNorm of it over the last dimension: a residual connection and the norm behind
    it.

    Args:
        x, y (Tensor): `[..., W]`.
        scale: factor on y.
        weight (Tensor): `[W]`.
        eps: added to the mean square.
        out_dtype: of the norm; x's dtype if None.

    Returns:
        The sum in x's dtype, and its norm (of the sum before it is rounded), both in x's shape. Gradients
        flow with every backend but `triton` (through PyTorch).

    Raises:
        ValueError: shapes that do not fit together, or an unavailable backend.
    """
    _check_weight(x, weight)
    if x.shape != y.shape:
        raise ValueError(f"y must have x's shape {list(x.shape)}, got {list(y.shape)}")
    limit = _beyond_triton(x, y, weight)
    name = choose_backend("add_rms_norm", x, backend, {"cpp": None, "triton": limit})
    if name == "triton":
        from .triton_inference import triton_add_norm

        total, out = triton_add_norm(x, y, scale, weight, eps)
    elif name == "cpp":
        return cpp_add_rms_norm(x, y, scale, weight, eps, out_dtype or x.dtype)
    else:
        run = {"naive": naive_add_rms_norm, "torch": plain_add_rms_norm}[name]
        total, out = run(x, y, scale, weight, eps)
    return total.to(x.dtype), out.to(out_dtype or x.dtype)


def add_scaled(x: Tensor, y: Tensor, scale: float, *, backend: Backend | None = None) -> Tensor:
    """x + scale * y: a residual connection.

    Args:
        x, y (Tensor): of one shape.
        scale: factor on y.

    Returns:
        x's shape and dtype; computed in float32 (float64 for float64). Gradients flow to both.

    Raises:
        ValueError: shapes that differ, or an unavailable backend.
    """
    if x.shape != y.shape:
        raise ValueError(f"y must have x's shape {list(x.shape)}, got {list(y.shape)}")
    name = choose_backend("add_scaled", x, backend, {"cpp": None, "triton": _beyond_triton(x, y)})
    if name == "triton":
        from .triton_inference import triton_add_norm

        return triton_add_norm(x, y, scale, None, 0.0)[0]
    run = {"naive": naive_add_scaled, "torch": plain_add_scaled, "cpp": cpp_add_scaled}[name]
    return run(x, y, scale).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """silu(gate) * up, the middle of a SwiGLU feed-forward.

    Args:
        gate, up (Tensor): `[..., W]`; with `triton`, parts of wider rows are read where they lie.

    Returns:
        gate's shape and dtype; computed in float32 (float64 for float64). Gradients flow to both.

    Raises:
        ValueError: shapes that differ, or an unavailable backend.

    Source: arXiv 2002.05202, equation 6.
    """
    if gate.shape != up.shape:
        raise ValueError(f"up must have gate's shape {list(gate.shape)}, got {list(up.shape)}")
    name = choose_backend("silu_mul", gate, backend, {"cpp": None, "triton": None})
    if name == "triton" and _beyond_triton(gate, up, widest=None):
        from .triton import triton_silu_mul_learning

        return triton_silu_mul_learning(gate, up)
    if name == "triton":
        from .triton_inference import triton_silu_mul

        return triton_silu_mul(gate, up)
    run = {"naive": naive_silu_mul, "torch": plain_silu_mul, "cpp": cpp_silu_mul}[name]
    return run(gate, up).to(gate.dtype)


def split_heads(
    x: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the result of one product, the first two by `norm_rope`. For inference.

    Args:
        x (Tensor): `[B, T, (heads + 2 * kv_heads) * D]`: heads of queries, of keys, of values; rows may be
            parts of wider rows.
        heads, kv_heads: how many of queries, and of keys and of values.
        q_weight, k_weight (Tensor): `[D]` of their norms, or None for none; they come together.
        cos, sin (Tensor): `[B, T, D / 2]` or `[1, T, D / 2]`, float32, or None for no rotation.
        eps: added to the mean square.

    Returns:
        q `[B, T, heads, D]`, k and v `[B, T, kv_heads, D]` in x's dtype (computed in float32):
        contiguous with `triton`, in one launch. Without norm and rotation, views of x. No gradients.

    Raises:
        ValueError: a width that the heads do not divide, a single weight, or an unavailable backend.

    Source: MiniCPM-SALA (arXiv 2602.11761) section 2.1 (QK-norm, HyPE).
    """
    dim, rest = divmod(x.shape[-1], heads + 2 * kv_heads)
    if rest:
        raise ValueError(f"x must have {heads} + 2 * {kv_heads} heads in a row, got {x.shape[-1]} elements")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together")
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    with torch.no_grad():
        if q_weight is not None or cos is not None:
            limit = f"the head dimension {dim} is above 256" if dim > 256 else None
            limit = limit or _beyond_triton(x, widest=None)
            if choose_backend("split_heads", x, backend, {"cpp": None, "triton": limit}) == "triton":
                from .triton_inference import triton_split_heads

                return triton_split_heads(x, heads, kv_heads, q_weight, k_weight, cos, sin, eps)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in x.split(sizes, -1))
        if q_weight is not None or cos is not None:
            q = norm_rope(q, q_weight, cos, sin, eps, backend=backend)
            k = norm_rope(k, k_weight, cos, sin, eps, backend=backend)
        return q, k, v


def _beyond_triton(*tensors: Tensor, widest: int | None = WIDEST) -> str | None:
    """Why the inference kernels cannot run this call, or None."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "gradients are wanted, which only the torch form has: call it under torch.no_grad()"
    width = tensors[0].shape[-1]
    return f"rows of {width} are above {widest}" if widest is not None and width > widest else None


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], as wide as x; got {list(weight.shape)}")
