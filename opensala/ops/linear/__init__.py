"""The linear layer for inference on a CPU: a product whose every row keeps its bits whatever rows share the
call.

Library products choose their blocking, and with it the order of sums, by the number of rows, so that the
same token gives other bits alone than in a batch. The compiled kernel here sums every element in one order.
"""

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from .cpp import cpp_linear
from .naive import naive_linear
from .plain import plain_linear

__all__ = ["linear"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """x W^T + b, computed in float32 whatever dtype the weights are stored in.

    The `cpp` backend is batch-invariant: a row's bits depend on that row alone, not on the other rows of the
    call, its place among them, or the number of threads. `torch` is not. Gradients flow through `torch` and
    `naive` only.

    Args:
        x (Tensor): `[..., K]`, float32 (float64 for the other backends).
        weight (Tensor): `[N, K]`, float32, bfloat16 or float16 (or x's dtype), as `nn.Linear` keeps it.
        bias (Tensor): `[N]`, or None.
        backend: which implementation runs; chosen by `choose_backend` if None.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unavailable backend.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must be [N, K] with x [..., K]; got weight {list(weight.shape)}, x {list(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [{weight.shape[0]}], one for each row of weight; got {list(bias.shape)}"
        )
    name = choose_backend("linear", x, backend, {"cpp": _beyond_cpp(x, weight, bias)})
    run = {"naive": naive_linear, "torch": plain_linear, "cpp": cpp_linear}[name]
    return run(x, weight, bias)


def _beyond_cpp(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the compiled kernel cannot run this call, or None."""
    if x.dtype != torch.float32 or weight.dtype not in WEIGHT_DTYPES:
        return (
            "it takes float32 x and float32, bfloat16 or float16 weights, got "
            f"{_short(x.dtype)} and {_short(weight.dtype)}"
        )
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return "gradients are wanted, which only the torch form has: call it under torch.no_grad()"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
