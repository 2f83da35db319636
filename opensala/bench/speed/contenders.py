"""What is measured, inside a process of its own: reading a prompt piece by piece, and generating token by
token.

Weights are random, and so are the prompts: neither changes how long anything takes.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config

from ...engine import Engine, EngineOptions, SamplingParams
from ...engine.precision import Precision, apply_precision, choose_precision, precision_of
from ...model import MiniCPMSALAForCausalLM, layers
from ...model.compat import CACHE_ARGUMENT
from ...model.quantised import QuantisedLinear, set_module
from ...model.storage import text_bytes
from ...ops.linear.gptq import Codes
from ...ops.linear.speed import kept_times
from ...ops.native import Library
from .presets import Preset

PIECE = 4096  # tokens read at a time, which is also a step of the engine
_BITS = {"int8": 8, "int4": 4}
_GROUP = 32  # columns that share a scale, as in llama.cpp's Q4_0 and Q8_0


class Hybrid:
    """MiniCPM-SALA in the engine, weights in `float32`, `bfloat16`, `int8` or `int4`; keys and values in
    16 bits on a CPU if the weights are in no more, as llama.cpp keeps its own."""

    def __init__(self, preset: Preset, weights: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, config = device, preset.hybrid
        if device.type == "cpu":
            model = MiniCPMSALAForCausalLM._from_config(config, dtype=torch.float32)
            if weights in _BITS:
                quantise_at_random(model, _BITS[weights])
            apply_precision(model, self._precision(config, weights))
        else:
            with device:
                model = MiniCPMSALAForCausalLM._from_config(config, dtype=torch.bfloat16)
            model.model.merge_projections(device)
        self.model = model.eval().requires_grad_(False)
        self.kv_dtype = "bfloat16" if device.type == "cpu" and weights != "float32" else "auto"
        self.dtype = precision_of(self.model)
        if self.kv_dtype != "auto":
            self.dtype += f", {self.kv_dtype} keys and values"
        self.engine: Engine | None = None

    @staticmethod
    def _precision(config: Any, weights: str) -> Precision:
        if weights == "float32":
            return Precision()
        times = kept_times(config.hidden_size, config.intermediate_size, torch.bfloat16)
        return choose_precision(torch.bfloat16, times)

    def start(self, tokens: int, new: int) -> None:
        self.engine = None
        gc.collect()
        room = tokens + new + 256
        options = EngineOptions(
            max_batch_tokens=PIECE, max_running=1, max_cached_tokens=room, kv_dtype=self.kv_dtype
        )
        self.engine = Engine(self.model, None, options)
        self.tokens = tokens
        prompt = torch.randint(3, self.model.config.vocab_size, (tokens,)).tolist()
        self.request = self.engine.add(prompt, SamplingParams(max_tokens=new + 1, ignore_eos=True))

    def read(self, count: int) -> None:
        assert self.engine is not None, "started"
        for _ in range(-(-count // PIECE)):
            self.engine.step()

    def decode(self) -> None:
        assert self.engine is not None, "started"
        self.engine.step()

    def cache_bytes(self, tokens: int) -> int:
        assert self.engine is not None, "started"
        return text_bytes(self.model.config, tokens, self.engine.dtype, self.engine.kv_dtype)

    def parts(self, work: Callable[[], None]) -> dict[str, float]:
        """Seconds of each native kernel while `work` runs, and of all the rest."""
        with timed_calls() as seconds:
            start = time.perf_counter()
            work()
            whole = time.perf_counter() - start
        return {**seconds, "rest": whole - sum(seconds.values())}


def quantise_at_random(model: MiniCPMSALAForCausalLM, bits: int) -> None:
    """Put layers of random codes in the place of all linear ones: as fast as real ones."""
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        outer, inner = linear.weight.shape
        codes = Codes(
            torch.randint(0, 1 << bits, (outer, inner), dtype=torch.int32),
            torch.rand(outer, inner // _GROUP) / inner**0.5 / (1 << bits - 2),
            torch.full((outer, inner // _GROUP), 1 << bits - 1, dtype=torch.int32),
            torch.arange(inner) // _GROUP,
        )
        made = QuantisedLinear.of(codes, linear.bias, bits=bits, group=_GROUP)
        made.pack()
        set_module(model, name, made)
    gc.collect()


@contextmanager
def timed_calls() -> Iterator[dict[str, float]]:
    """Within the block, the seconds of every native call add up under its name, and those of 16-bit
    products."""
    seconds: dict[str, float] = {}
    call, product = Library.call, layers.half_product

    def timed(self: Library, name: str, *arguments: object) -> None:
        start = time.perf_counter()
        call(self, name, *arguments)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def timed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        start = time.perf_counter()
        made = product(x, weight, bias)
        name = "opensala_linear, 16 bits"
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return made

    Library.call = timed  # type: ignore[method-assign]
    layers.half_product = timed_product
    try:
        yield seconds
    finally:
        Library.call = call  # type: ignore[method-assign]
        layers.half_product = product


class Dense:
    """The dense Transformer in transformers with torch's scaled_dot_product_attention, read in pieces."""

    def __init__(self, preset: Preset, weights: str, device: torch.device) -> None:
        from transformers import LlamaForCausalLM, Qwen3ForCausalLM

        torch.manual_seed(0)
        config = preset.dense
        dtype = torch.bfloat16
        if device.type == "cpu" and weights == "float32":
            dtype = torch.float32
        kind = Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM
        with device:
            self.model: Any = kind._from_config(config, dtype=dtype).eval().requires_grad_(False)
        self.dtype = f"{weights} everywhere"
        self.device = device

    @torch.inference_mode()
    def start(self, tokens: int, new: int) -> None:
        self.cache = DynamicCache()
        gc.collect()
        self.ids = torch.randint(3, self.model.config.vocab_size, (1, tokens), device=self.device)
        self.done = 0

    @torch.inference_mode()
    def read(self, count: int) -> None:
        self._forward(self.ids[:, self.done : self.done + count])
        self.done += count

    def _forward(self, ids: Tensor) -> None:
        output = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: self.cache})
        self.next = output.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def decode(self) -> None:
        self._forward(self.next)

    def cache_bytes(self, tokens: int) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
