"""The plain statement of the linear layer, in the dtype of x (call it in float64)."""

from torch import Tensor


def naive_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out[..., n] = sum over k of x[..., k] weight[n, k], + bias[n]."""
    out = (x[..., None, :] * weight.to(x.dtype)).sum(-1)
    return out if bias is None else out + bias.to(x.dtype)
