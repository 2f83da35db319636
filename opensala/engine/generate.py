"""From a prompt to text: load a model, read the prompt in chunks, let transformers generate, and measure.

Sampling, stopping criteria and streaming are transformers'. This module knows nothing of command lines.
"""

import time
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, TextStreamer

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, SALACache, describe_attention
from .memory import check_prompt_fits, peak_bytes
from .prefill import CHUNK, prefill
from .progress import token_progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shipped_model() -> Path:
    """Folder of the small model that comes with the package."""
    return Path(str(resources.files("opensala") / "assets" / "small"))


@dataclass
class Sampling:
    """How to choose tokens; temperature 0 takes the most likely one."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def check(self) -> None:
        """ValueError for a field out of range."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@dataclass
class Generation:
    """What was generated and what it cost; times in seconds, sizes in bytes."""

    text: str
    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    peak_memory_bytes: int
    cache_bytes: int
    attention: str
    model: str
    device: str
    dtype: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Timed(TextStreamer):
    """Notes when the first token came, and passes tokens on to a printing streamer if there is one."""

    def __init__(self, tokenizer: Any, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.first, self._calls = show, 0.0, 0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self.first = time.perf_counter()
        if self.show:
            super().put(value)

    def end(self) -> None:
        if self.show:
            super().end()


class Engine:
    """A loaded model with its tokenizer.

    Args:
        model: folder or hub name of a MiniCPM-SALA checkpoint; None for the shipped one.
        device: `auto`, `cpu`, `cuda`, ...; `auto` takes a CUDA GPU if there is one.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; `auto` is float32 on a CPU (half precision is
            many times slower there) and bfloat16 elsewhere.
        attention_mode: `auto`, `dense` or `sparse`; None for what the checkpoint says.
        block_search: `exact` or `hierarchical`; None for what the checkpoint says.

    Raises:
        ValueError: an unknown device or dtype, a checkpoint that is missing, broken or of another kind.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention_mode: str | None = None,
        block_search: str | None = None,
    ) -> None:
        self.name = model or str(shipped_model())
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        config = _config(self.name)
        if attention_mode is not None:
            config.attention_mode = attention_mode
        if block_search is not None:
            config.block_search = block_search
        config.check()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.name}: no usable tokenizer ({_first_line(error)})") from error
        try:
            self.model = MiniCPMSALAForCausalLM.from_pretrained(
                self.name, config=config, dtype=self.dtype
            ).to(self.device)
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be loaded ({_first_line(error)})") from error
        self.model.eval()
        self.config: MiniCPMSALAConfig = self.model.config

    def encode_prompt(self, text: str) -> Tensor:
        """Token ids `[1, T]` of a raw prompt."""
        return self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.device)

    def check_prompt(self, tokens: int, new_tokens: int, chunk: int = CHUNK) -> list[str]:
        """Refuse a prompt that memory cannot hold; return remarks the user should see."""
        check_prompt_fits(self.config, tokens + new_tokens, chunk, self.dtype, self.device)
        limit = self.config.max_position_embeddings
        if tokens + new_tokens > limit:
            return [
                f"the prompt and its answer take {tokens + new_tokens:,} tokens; the model was made for "
                f"{limit:,}"
            ]
        return []

    def generate(
        self,
        ids: Tensor,
        sampling: Sampling,
        *,
        label: str = "reading",
        chunk: int = CHUNK,
        stream: bool = False,
        quiet: bool = False,
        cache: SALACache | None = None,
    ) -> Generation:
        """Read `ids` `[1, T]` and continue them.

        Args:
            label: what the progress bar says.
            chunk: tokens read at a time.
            stream: print the text to stdout as it comes.
            quiet: no progress bar.
            cache: continue from this cache: `ids` are then only the new tokens. It is extended in place.

        Raises:
            ValueError: bad sampling values, an empty prompt, a prompt that memory cannot hold.
        """
        sampling.check()
        tokens = ids.shape[1]
        notes = self.check_prompt(tokens, sampling.max_new_tokens, chunk)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        cache = cache if cache is not None else SALACache(self.config)
        held = cache.columns
        start = time.perf_counter()
        with token_progress(label, tokens, quiet) as advance:
            if tokens > 1:
                prefill(
                    self.model,
                    ids[:, :-1],
                    cache,
                    chunk=chunk,
                    new_tokens=sampling.max_new_tokens + 1,
                    progress=advance,
                )
            advance(1)
        streamer = _Timed(self.tokenizer, stream)
        whole = torch.cat([ids.new_zeros(1, held), ids], 1)  # transformers reads only what the cache lacks
        chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        output = self.model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            past_key_values=cache,
            streamer=streamer,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=self.config.pad_token_id,
            **chosen,
        )
        end = time.perf_counter()
        new = output[0, whole.shape[1] :]
        first = streamer.first - start
        mode = "sparse" if self.model.model._sparse([held + tokens])[0] else "dense"
        return Generation(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=held + tokens,
            new_tokens=len(new),
            time_to_first_token=first,
            prefill_tokens_per_second=tokens / first,
            decode_tokens_per_second=(len(new) - 1) / (end - streamer.first) if len(new) > 1 else None,
            peak_memory_bytes=peak_bytes(self.device),
            cache_bytes=cache.num_bytes(),
            attention=describe_attention(self.config, mode, self.model.model.norm.weight),
            model=self.name,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            notes=notes,
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no CUDA GPU is usable here; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _config(name: str) -> MiniCPMSALAConfig:
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(f"{name}: no such checkpoint folder (and not a hub name like owner/model)")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"{name}: no checkpoint to be found there ({_first_line(error)})") from error
    if not isinstance(config, MiniCPMSALAConfig):
        raise ValueError(
            f"{name}: a {config.model_type} model; this command runs {MiniCPMSALAConfig.model_type} "
            "checkpoints"
        )
    return config
