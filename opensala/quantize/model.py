"""A whole model in few bits, layer by layer: each is calibrated on what the quantised layers before it give.

Shapes: S calibration sequences of T tokens, W hidden size.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..model.layout import SequenceLayout, rows_layout
from ..model.quantised import QuantisedLinear, set_module
from ..ops.linear.gptq import gptq_shapes
from .gptq import quantise_matrix
from .layers import KINDS, kind_of, stages_of

_TOKENS = 8192  # of calibration sequences that go through a layer at a time


@dataclass(frozen=True)
class LayerError:
    """What rounding did to one linear layer: the relative error of its output on the calibration inputs."""

    name: str
    kind: str
    error: float


def check_sizes(model: MiniCPMSALAForCausalLM, kinds: Collection[str], bits: int, group: int) -> int:
    """How many linear layers will be quantised; before any work, so that a group that does not fit costs
    none.

    Raises:
        ValueError: naming the first layer that does not fit; a model that is quantised already.
    """
    count = 0
    if any(isinstance(module, QuantisedLinear) for module in model.modules()):
        raise ValueError("the model is quantised already: quantise the checkpoint that it was made from")
    for i, layer in enumerate(model.model.layers):
        for name in (n for stage in stages_of(layer, kinds) for n in stage):
            _check_size(f"model.layers.{i}.{name}", layer.get_submodule(name), bits, group)
            count += 1
    if "head" in kinds:
        _check_size("lm_head", model.lm_head, bits, group)
        count += 1
    return count


def _check_size(name: str, linear: nn.Module, bits: int, group: int) -> None:
    assert isinstance(linear, nn.Linear), "chosen for that"
    try:
        gptq_shapes(linear.out_features, linear.in_features, bits, group)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@torch.no_grad()
def quantise_model(
    model: MiniCPMSALAForCausalLM,
    ids: Tensor,
    *,
    kinds: Collection[str],
    bits: int,
    group: int,
    done: Callable[[], None] = lambda: None,
) -> list[LayerError]:
    """Replace a model's linear layers of these kinds by quantised ones, in place.

    Args:
        model: in float32, on a CPU.
        ids: calibration sequences `[S, T]`.
        done: called after each linear layer.

    Raises:
        ValueError: see `check_sizes`; weights or activations that are not finite, naming the layer.
    """
    assert {*kinds} <= {*KINDS}, "checked before"
    rows = max(1, _TOKENS // ids.shape[1])
    batches = [model.model.embed_tokens(part) * model.config.scale_emb for part in ids.split(rows)]
    sparse = model.config.attends_sparsely(ids.shape[1])
    layouts = [rows_layout((x.shape[0], x.shape[1]), None, [sparse] * x.shape[0], x.device) for x in batches]
    errors: list[LayerError] = []
    for i, layer in enumerate(model.model.layers):
        for stage in stages_of(layer, kinds):
            hessian = _hessian(layer, stage[0], batches, layouts)
            for name in stage:
                kind = kind_of(layer.get_submodule("self_attn"), name)
                whole = f"model.layers.{i}.{name}"
                errors.append(LayerError(whole, kind, _replace(model, whole, hessian, bits, group)))
                done()
        batches = [layer(x, layout) for x, layout in zip(batches, layouts, strict=True)]
    if "head" in kinds:
        inputs = [model.model.norm(x) / model.config.logit_divisor for x in batches]
        hessian = _sum_of_products(inputs)
        errors.append(LayerError("lm_head", "head", _replace(model, "lm_head", hessian, bits, group)))
        done()
    return errors


def _hessian(layer: nn.Module, name: str, batches: list[Tensor], layouts: list[SequenceLayout]) -> Tensor:
    """X^T X `[K, K]` of what a linear layer is given while its decoder layer reads the batches."""
    seen: list[Tensor] = []
    total: Tensor | None = None

    def keep(_module: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given[0])

    handle = layer.get_submodule(name).register_forward_pre_hook(keep)
    try:
        for x, layout in zip(batches, layouts, strict=True):
            layer(x, layout)
            product = _sum_of_products(seen)
            total = product if total is None else total + product
            seen.clear()
    finally:
        handle.remove()
    assert total is not None, "there is at least one batch"
    return total


def _sum_of_products(inputs: list[Tensor]) -> Tensor:
    flat = torch.cat([x.flatten(0, -2) for x in inputs]).float()
    return flat.T @ flat


def _replace(model: nn.Module, name: str, hessian: Tensor, bits: int, group: int) -> float:
    """Quantise one linear layer in place; the relative error of its output."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), "chosen for that"
    try:
        codes, error = quantise_matrix(linear.weight, hessian, bits=bits, group=group)
    except ValueError as failed:
        raise ValueError(f"{name}: {failed}") from failed
    set_module(model, name, QuantisedLinear.of(codes, linear.bias, bits=bits, group=group))
    return error
