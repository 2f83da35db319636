"""The `quantization_config` of a checkpoint in the GPTQ layout, as transformers asks for it.

Files say `quant_method` "gptq", as other readers want it; among transformers' loaders ours has a name of its
own.
"""

from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..ops.linear.gptq import BITS, FORMATS
from .fields import check_choice

METHOD = "opensala-gptq"


@register_quantization_config(METHOD)
class GptqLayoutConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint in the GPTQ layout.

    Raises:
        ValueError: a field out of its range, or a layout that is not read here.
    """

    def __init__(
        self,
        bits: int | None = None,
        group_size: int = 128,
        desc_act: bool = False,
        sym: bool = True,
        checkpoint_format: str = "gptq",
        **others: Any,
    ) -> None:
        self.quant_method = METHOD
        if isinstance(bits, bool) or bits not in BITS:
            raise ValueError(f"quantization_config.bits must be 4 or 8, got {bits!r}")
        whole = isinstance(group_size, int) and not isinstance(group_size, bool)
        if not whole or not (group_size == -1 or group_size >= 1):
            raise ValueError(f"quantization_config.group_size must be -1 or at least 1, got {group_size!r}")
        others.pop("quant_method", None)
        layout = others.pop("format", None) or checkpoint_format  # GPTQModel's newer name for it
        check_choice("quantization_config.checkpoint_format", layout, FORMATS)
        self.bits, self.group_size, self.desc_act, self.sym = bits, group_size, desc_act, sym
        self.checkpoint_format = layout
        self.others = others

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary: transformers asks a configuration either way."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """As other readers want it."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "checkpoint_format": self.checkpoint_format,
            **self.others,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def ask_for_our_loader(given: dict[str, Any]) -> None:
    """Among the fields of a configuration: a `quantization_config` in the GPTQ layout becomes ours, in
    place."""
    quantization = given.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "gptq":
        fields = {name: value for name, value in quantization.items() if name != "quant_method"}
        given["quantization_config"] = GptqLayoutConfig(**fields)
