"""A second CPU kernel for layers of 4 bits in the GPTQ layout: that of `auto-round-lib` (Intel, Apache-2.0),
where it is installed and asked for.

`OPENSALA_INT4_KERNEL=auto-round` lets `load_engine` take it, `use_auto_round` puts it into a model. A model
with it decodes layer by layer: the compiled decoding step reads weights in our own layout. Its products are
float32 with the weights that the codes stand for, within about 2e-6 of the largest element; unlike ours, they
do not promise that a row has the same bits whatever rows share the call.
"""

import importlib.util
import os

import torch
from torch import Tensor, nn

from ..ops.linear.gptq import to_gptq
from .quantised import QuantisedLinear, quantised_layers, set_module

VARIABLE = "OPENSALA_INT4_KERNEL"
KERNELS = ("native", "auto-round")
_BITS = 4


def int4_kernel() -> str:
    """The kernel that the variable names; `native` without it.

    Raises:
        ValueError: another name.
    """
    name = os.environ.get(VARIABLE) or KERNELS[0]
    if name not in KERNELS:
        raise ValueError(f"{VARIABLE} must be {' or '.join(KERNELS)}, got {name!r}")
    return name


def why_not() -> str | None:
    """Why the kernel cannot run here, and what to do; None if it can."""
    if importlib.util.find_spec("auto_round_kernel") is None:
        return "auto-round-lib is not installed: pip install 'opensala[auto-round]'"
    return None


class AutoRoundLinear(nn.Module):
    """A linear layer over 4-bit codes in auto-round-lib's own layout, for float32 inference on a CPU.

    Args:
        layer: what it takes the place of; its codes are copied.

    Raises:
        ValueError: codes that the kernel would read otherwise: bits other than 4, columns reordered by
            activation, a zero point of 0 (stored as 15 it is 16 to this kernel).
    """

    def __init__(self, layer: QuantisedLinear) -> None:
        super().__init__()
        reason = unfit(layer)
        if reason:
            raise ValueError(f"auto-round-lib cannot take this layer: {reason}")
        from auto_round_kernel.qlinear import QuantLinearGPTQ

        codes = layer.codes
        group = layer.in_features if layer.group == -1 else layer.group
        middle = bool((codes.zeros == 1 << _BITS - 1).all())
        sizes = (layer.in_features, layer.out_features)
        biased = layer.bias is not None
        made = QuantLinearGPTQ(_BITS, group, middle, *sizes, biased, weight_dtype=torch.float32)
        tensors = to_gptq(codes, _BITS)
        made.qweight, made.qzeros, made.scales = tensors.qweight, tensors.qzeros, tensors.scales.float()
        if layer.bias is not None:
            made.bias = layer.bias.detach().float().clone()
        made.post_init()
        # As a parameter it counts as a weight: what runs only weights of our own kinds (recorded steps, the
        # compiled one) sees that this is none.
        self.blob = nn.Parameter(made.qweight, requires_grad=False)
        del made.qweight
        made.qweight = self.blob
        self.in_features, self.out_features = sizes
        self._kernel = [made]  # in a list: its tensors are no part of this module's state

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` float32 on a CPU to `[..., out]`."""
        if input.dtype != torch.float32 or input.device.type != "cpu":
            where = f"{str(input.dtype).removeprefix('torch.')} on {input.device}"
            raise ValueError(f"auto-round-lib's kernel takes float32 on a CPU, got {where}: unset {VARIABLE}")
        return self._kernel[0](input.contiguous())

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        raise ValueError(
            f"{prefix.rstrip('.')} lies in auto-round-lib's own layout and cannot be saved: unset {VARIABLE} "
            "and load the model again"
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={_BITS}, auto-round-lib"


def unfit(layer: QuantisedLinear) -> str | None:
    """Why the kernel does not fit a layer, or None."""
    if layer.bits != _BITS:
        return f"it has {layer.bits} bits, not {_BITS}"
    if not layer._in_order:
        return "its columns are reordered by activation"
    if bool((layer.codes.zeros == 0).any()):
        return "a zero point is 0, which the kernel reads as 16"
    return None


def use_auto_round(model: nn.Module) -> int:
    """Put the kernel into all layers of 4 bits that it fits; how many.

    Raises:
        ValueError: it is not installed, or fits no layer.
    """
    reason = why_not()
    if reason:
        raise ValueError(f"{VARIABLE}=auto-round: {reason}")
    layers = {name: layer for name, layer in quantised_layers(model).items() if unfit(layer) is None}
    if not layers:
        raise ValueError(
            f"{VARIABLE}=auto-round: the model has no layer of {_BITS} bits that it fits: quantise it first "
            "(opensala quantize), or unset the variable"
        )
    for name, layer in layers.items():
        set_module(model, name, AutoRoundLinear(layer))
    return len(layers)
