"""Linear layers with weights in 4 or 8 bits, in the GPTQ layout, and how transformers loads them.

A checkpoint says in its `quantization_config` that it is in the layout (`quant_method` "gptq", as other
readers want it). transformers' own loader of that name needs two more packages; ours is registered beside it
through transformers' public functions, and `MiniCPMSALAConfig` asks for ours by its own name. Which layers
are quantised is read off the files: those with a `qweight`. Nothing here quantises; see `opensala.quantize`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantizer

from ..ops.backends import planned_backend
from ..ops.linear.gptq import Codes, GptqTensors, from_gptq, gptq_shapes, to_gptq
from ..ops.linear.quantised import QuantisedWeight, quantised_linear
from ..ops.linear.speed import half_product
from .gptq_config import METHOD, GptqLayoutConfig
from .layers import runs_alone

_NAMES = GptqTensors._fields


class QuantisedLinear(nn.Module):
    """A linear layer whose weights `[out, in]` are codes of 4 or 8 bits in the GPTQ layout; no gradients.

    The product is that with the weights that the codes stand for, in the dtype of the input. In float32
    inference on a CPU the codes lie in the layout of the compiled product instead (`pack`), and what a
    checkpoint needs is made from that when it is asked for; moved or saved, it is the same layer.

    Args:
        in_features, out_features, bias: as of nn.Linear.
        bits: 4 or 8.
        group: columns that share a scale, -1 for a whole row.
        layout: `gptq` or `gptq_v2`, see `ops/linear/gptq.py`.

    Raises:
        ValueError: sizes that the layout does not take.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    half_rows: int | None = None  # rows from which weights are written out in bfloat16: see `layers.product`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        bits: int = 4,
        group: int = 128,
        layout: str = "gptq",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group, self.layout = bits, group, layout
        for name, shape in gptq_shapes(out_features, in_features, bits, group).items():
            dtype = torch.float16 if name == "scales" else torch.int32
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._packed: QuantisedWeight | None = None
        self._order: tuple[tuple[int, int], bool] | None = None

    @classmethod
    def of(
        cls, codes: Codes, bias: Tensor | None, *, bits: int, group: int, layout: str = "gptq"
    ) -> "QuantisedLinear":
        """A layer of plain numbers."""
        outer, inner = codes.codes.shape
        made = cls(inner, outer, bias is not None, bits=bits, group=group, layout=layout)
        for name, tensor in to_gptq(codes, bits, layout)._asdict().items():
            setattr(made, name, tensor)
        if bias is not None:
            made.bias = bias.detach().clone()
        return made

    @property
    def codes(self) -> Codes:
        """The plain numbers of its weights."""
        return from_gptq(self._tensors(), self.bits, self.layout)

    def _tensors(self) -> GptqTensors:
        if self._packed is None:
            return GptqTensors(self.qweight, self.qzeros, self.scales, self.g_idx)
        packed, shift = self._packed, _shift(self.bits)
        middle = (1 << self.bits - 1) - shift
        zeros = torch.full_like(packed.scales, middle) if packed.zeros is None else packed.zeros
        plain = Codes(
            packed.plain_codes().int() + shift, packed.scales, zeros.int() + shift, self.g_idx.long()
        )
        return to_gptq(plain, self.bits, self.layout)

    def pack(self) -> "QuantisedWeight | None":
        """Its weights as the compiled product on a CPU takes them, from now on their only form; None where it
        takes no such (columns reordered by activation, groups that are no multiple of 16)."""
        if self._packed is None and self._packable():
            codes, shift = self.codes, _shift(self.bits)
            size = self.in_features if self.group == -1 else self.group
            zeros = codes.zeros - shift
            middle = bool((codes.zeros == 1 << self.bits - 1).all())
            self._packed = QuantisedWeight.from_codes(
                codes.codes - shift, codes.scales, None if middle else zeros, bits=self.bits, group=size
            )
            for name in ("qweight", "qzeros", "scales"):
                setattr(self, name, None)
        return self._packed

    def _packable(self) -> bool:
        size = self.in_features if self.group == -1 else self.group
        return self._in_order and (size % 16 == 0 or size == self.in_features)

    def _unpack(self) -> None:
        tensors, self._packed = self._tensors(), None
        for name in _NAMES:
            setattr(self, name, getattr(tensors, name))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._packed is not None:
            self._unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._packed is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, tensor in self._tensors()._asdict().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def weights(self) -> Tensor:
        """The weights `[out, in]` that the codes stand for, float32."""
        return self.codes.weights() if self._packed is None else self._packed.dequantised()

    def check(self, name: str) -> None:
        """Refuse numbers that no writer of the layout makes; `name` is what the message calls the layer.

        Raises:
            ValueError: groups outside the scales, scales that are not finite.
        """
        groups = self.scales.shape[0]
        if not (0 <= int(self.g_idx.min()) <= int(self.g_idx.max()) < groups):
            raise ValueError(f"{name}.g_idx names groups outside 0..{groups - 1}: the file is damaged")
        if not bool(torch.isfinite(self.scales).all()):
            raise ValueError(f"{name}.scales holds numbers that are not finite: the file is damaged")

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float32 and input.device.type == "cpu" and runs_alone(input):
            packed = self.pack()
            if self.half_rows is not None and input.shape[:-1].numel() >= self.half_rows:
                return half_product(input, self.weights().bfloat16(), self.bias)
            if packed is not None:
                return quantised_linear(input, packed, self.bias)
        if input.is_cuda and runs_alone(input):
            few = self._few_rows(input)
            if few is not None:
                return few
        weight = self.weights().to(input.dtype)
        return nn.functional.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """The product of few rows on a GPU, by codes as they lie; None where the kernel is not for it."""
        rows = x.shape[:-1].numel()
        if not rows or planned_backend(x) != "triton":
            return None
        if x.dtype == torch.float32 and x.is_cuda:  # the kernel would spill its registers
            return None
        from ..ops.linear import triton_gptq  # needs triton

        if triton_gptq.beyond_triton(self.in_features, self.group, rows, self._in_order):
            return None
        flat = x.reshape(rows, self.in_features).contiguous()
        found = triton_gptq.triton_gptq(flat, self._tensors(), self.bits, self.group, self.layout)
        if self.bias is not None:
            found = found + self.bias.to(found.dtype)
        return found.view(*x.shape[:-1], self.out_features)

    @property
    def _in_order(self) -> bool:
        """Whether columns lie in groups in their own order; looked at once for each `g_idx`."""
        key = (self.g_idx.data_ptr(), self.g_idx._version)
        if self._order is None or self._order[0] != key:
            size = self.in_features if self.group == -1 else self.group
            expected = torch.arange(self.in_features, device=self.g_idx.device) // size
            self._order = key, torch.equal(self.g_idx.long(), expected)
        return self._order[1]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


def _shift(bits: int) -> int:
    """What GPTQ's codes, which begin at 0, are above those of the compiled product, which are signed in 8
    bits."""
    return 128 if bits == 8 else 0


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """The quantised layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def check_quantised(model: nn.Module) -> None:
    """Refuse a model whose quantised layers hold numbers that no writer makes (`QuantisedLinear.check`)."""
    for name, layer in quantised_layers(model).items():
        layer.check(name)


@register_quantizer(METHOD)
class GptqLayoutQuantizer(HfQuantizer):
    """Makes the modules that `from_pretrained` fills from a checkpoint in the GPTQ layout."""

    quantization_config: GptqLayoutConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config, files = self.quantization_config, kwargs.get("checkpoint_files") or []
        names = _quantised_names(files)
        if not names:
            raise ValueError(
                "quantization_config says that the checkpoint is in the GPTQ layout, and no file of it has "
                "a tensor named qweight"
            )
        for name in names:
            replace_linear(model, name, config.bits, config.group_size, config.checkpoint_format)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _quantised_names(files: Iterable[str]) -> list[str]:
    """Names of the layers that have a `qweight` in these files."""
    found: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            keys = opened.keys()
        found |= {key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")}
    return sorted(found)


def replace_linear(model: nn.Module, name: str, bits: int, group: int, layout: str) -> None:
    """Put an empty quantised layer in the place of a linear one.

    Raises:
        ValueError: the model has no such linear layer, or it does not fit the layout.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        old = None
    if not isinstance(old, nn.Linear):
        raise ValueError(f"the checkpoint has quantised weights for {name}, which the model does not have")
    try:
        made = QuantisedLinear(
            old.in_features, old.out_features, old.bias is not None, bits=bits, group=group, layout=layout
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    set_module(model, name, made)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
