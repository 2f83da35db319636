"""In which dtype a CPU stores weights, computes products and keeps keys and values.

Two things are chosen apart, by what the machine is fast at. *Storage*: a checkpoint in a 16-bit dtype may
keep its product weights in it; they are widened exactly as they are read, in the same order of sums, so every
bit of the output stays what float32 storage would have given. *Products*: many rows at once may be rounded to
that dtype and multiplied in it where the processor is faster so; that rounds activations to 16 bits, and a
row's bits then depend on how the prompt was cut. Attention to keys and values that are kept in bfloat16
(`EngineOptions.kv_dtype`) is rounded with them. All else (norms, rotary positions, states, attention
otherwise) is float32 either way.

Keys and values of a bfloat16 checkpoint are kept in bfloat16 on every CPU, as its own code keeps them: half
the memory, and less to read in each step. What a context is bound to so does not depend on the machine.

Nothing is ever rounded below what the checkpoint itself has: float32 weights stay float32.
"""

import logging
from dataclasses import dataclass

import torch

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.layers import Embedding, Linear
from ..model.quantised import QuantisedLinear, quantised_layers
from ..ops.linear.speed import ProductTimes, kept_times
from .options import KV_DTYPES

logger = logging.getLogger("opensala")

HALF = (torch.bfloat16, torch.float16)
# Decoding (up to 16 sequences with drafts) stays below and keeps the bits of float32 products.
HALF_ROWS = 128
_GAIN = 0.8  # half products must take at most so much of float32's time: their rounding must be worth it
_LOSS = 1.1  # storage in half the bytes may cost so much time in a single row
_said: set[str] = set()


@dataclass(frozen=True)
class Precision:
    """How a model computes on a CPU.

    Attributes:
        storage: dtype of the weights of products and of the embedding.
        half_rows: rows from which a product is computed in `storage` instead of float32; None: never.
    """

    storage: torch.dtype = torch.float32
    half_rows: int | None = None

    def __str__(self) -> str:
        stored = str(self.storage).removeprefix("torch.")
        if self.half_rows is None:
            return f"float32 products, {stored} weights"
        return f"{stored} products from {self.half_rows} rows on, float32 below, {stored} weights"


def choose_precision(own: torch.dtype, times: ProductTimes | None) -> Precision:
    """The faster of what a checkpoint of dtype `own` allows; `times` of that dtype (None: float32)."""
    if own not in HALF or times is None or times.one_stored > _LOSS * times.one:
        return Precision()
    faster = times.many_half < _GAIN * times.many
    return Precision(own, HALF_ROWS if faster else None)


def choose_kv_dtype(own: torch.dtype, computed: torch.dtype, context: str | None = None) -> str:
    """What `kv_dtype` auto means on a CPU: that of a context to be opened, as far as a model that computes in
    `computed` can have it; else what `own` says, the dtype of the checkpoint or the one asked for."""
    kept = KV_DTYPES.get(context or "auto")
    if context is not None and kept is not None and kept.itemsize <= computed.itemsize:
        return context
    return "bfloat16" if own == torch.bfloat16 else "auto"


def measured_precision(config: MiniCPMSALAConfig, own: torch.dtype, kv_dtype: str = "auto") -> Precision:
    """`choose_precision` by products of the feed-forward's shape, which are most of a model's; said once,
    with the dtype of keys and values if that is another one."""
    times = None
    if own in HALF:
        times = kept_times(config.hidden_size, config.intermediate_size, own)
    chosen = choose_precision(own, times)
    text = f"dtype auto on this CPU: {chosen}"
    if kv_dtype != "auto":
        text += f", {kv_dtype} keys and values"
    if times is not None:
        name = str(own).removeprefix("torch.")
        text += (
            f" ({name} against float32, measured here: {times.many / times.many_half:.1f}x the speed in "
            f"products of many rows, {times.one / times.one_stored:.1f}x in those of one)"
        )
    if text not in _said:
        _said.add(text)
        logger.warning(text)  # shown without any logging set up, as which attention runs is
    return chosen


def own_dtype(config: MiniCPMSALAConfig) -> torch.dtype:
    """The dtype that a checkpoint says it is in; float32 if it says nothing."""
    dtype = config.dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def precision_of(model: MiniCPMSALAForCausalLM) -> str:
    """What a model's products are computed in and its weights stored in, in words."""
    stored = model.get_input_embeddings().weight.dtype
    name = str(stored).removeprefix("torch.")
    text = f"{name} products, {name} weights"
    if model.compute_dtype == torch.float32:
        rows = next((m.half_rows for m in model.modules() if isinstance(m, Linear)), None)
        text = str(Precision(stored, rows))
    quantised = quantised_layers(model)
    if quantised:
        bits = sorted({layer.bits for layer in quantised.values()})
        text += f", {len(quantised)} layers in {' and '.join(map(str, bits))} bits"
    return text


@torch.no_grad()
def apply_precision(model: MiniCPMSALAForCausalLM, precision: Precision) -> None:
    """Bring a model's parameters into the chosen dtypes, in place.

    Weights of products and the embedding get `storage`, all other parameters (norms, biases) float32; codes
    of quantised layers stay as they are.
    """
    stored = set()
    for module in model.modules():
        if isinstance(module, (Linear, Embedding)):
            module.weight.data = module.weight.data.to(precision.storage)
            stored.add(id(module.weight))
            module.wide = torch.float32
        if isinstance(module, (Linear, QuantisedLinear)):
            module.half_rows = precision.half_rows
    for parameter in model.parameters():
        if id(parameter) not in stored:
            parameter.data = parameter.data.float()
