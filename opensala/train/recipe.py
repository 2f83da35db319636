"""What a recipe is: stages of training, their data, optimizer and guards, as frozen objects that check
themselves. The recipes themselves are in `recipes`."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..convert.config import ConvertConfig
from ..model.config import check_choice
from .schedule import Schedule

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Source:
    """Part of a mixture.

    Attributes:
        name: what `--data NAME=PATH` gives a path to.
        weight: share of the stage's tokens, relative to the other sources.
        path: file, folder or pattern (JSONL, Parquet, text); `python:code|prose|headers` (texts of the
            installation); `synthetic:facts|tracing|cross` (made as needed, at any length). Empty: must be
            given.
        long_from, long_factor: documents of fewer than `long_from` tokens are left out but for one in
            `long_factor`, so that longer ones make up that much more of the source.
    """

    name: str
    weight: float
    path: str = ""
    long_from: int = 0
    long_factor: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One stage of training on next-token loss.

    Attributes:
        sequence: tokens of a packed sequence.
        tokens, batch_tokens: in all, and of an optimizer step (rounded to whole sequences).
        sparse: block selection as at inference (documents from the model's dense_len on); off: dense whatever
            the length.
        chat: documents are conversations in the tokenizer's chat template, with loss on the answers only.
        dense_start: trains the softmax Transformer that HALO converts, instead of the hybrid.
        fresh_optimizer: forget the moments of the stage before.
        cp: ranks that share one sequence.
    """

    name: str
    sequence: int
    tokens: int
    batch_tokens: int
    schedule: Schedule
    mixture: tuple[Source, ...]
    sparse: bool = False
    chat: bool = False
    dense_start: bool = False
    fresh_optimizer: bool = False
    cp: int = 1

    @property
    def sequences(self) -> int:
        """Sequences of an optimizer step."""
        return max(1, round(self.batch_tokens / self.sequence))

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.sequences * self.sequence)))

    def check(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        self.schedule.check(self.name)
        for name in ("sequence", "tokens", "batch_tokens", "cp"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}.{name} must be a whole number of at least 1, got {value!r}")
        if self.sequence % self.cp:
            raise ValueError(
                f"{self.name}.sequence = {self.sequence} must be a multiple of {self.name}.cp = {self.cp}"
            )
        if not self.mixture or any(not s.weight > 0 for s in self.mixture):
            raise ValueError(f"{self.name}.mixture must have sources, each with a weight above 0")


@dataclass(frozen=True)
class Halo:
    """The first stage: a softmax Transformer becomes the hybrid (opensala.convert). Its teacher is filled in
    by the run."""

    config: ConvertConfig
    name: str = "halo"

    def check(self) -> None:
        self.config.check()


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Matrices inside the layers learn at rate / (hidden_size / dim_model_base), all else at the rate
    (muP)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Guard:
    """What is done about a bad step: it is skipped and logged; the next step reads the next data.

    Bad is a loss or gradient norm that is not finite, or more than `spike` times the median of the last
    `window` good ones (from the `least`-th on). After `patience` bad steps in a row the run stops; the last
    checkpoint is from before them.
    """

    spike: float = 10.0
    window: int = 64
    least: int = 16
    patience: int = 10


@dataclass(frozen=True)
class Recipe:
    """A whole training.

    Attributes:
        model: fields of the hybrid's `MiniCPMSALAConfig`.
        micro_tokens: tokens of one forward and backward pass on a device; at least one sequence (or its part
            under cp).
        recompute: keep layer inputs only and compute the rest again in the backward pass, with the same
            blocks selected.
        dtype: of weights and activations in a pass; master weights and moments are float32.
        probe_tokens: of each stage's own mixture (held out where the source has such a part) that loss is
            measured on before and after the stage; 0 for none.
        save_every, keep: steps between checkpoints, and how many of them are kept.
        chat_template: given to a tokenizer that has none before the first chat stage.
        scratch_tokens: what the same model would see in training from scratch (0: not to be compared).
        teacher: the Transformer that is converted if the run is given none.
    """

    name: str
    model: dict[str, Any]
    stages: tuple[Stage | Halo, ...]
    optimizer: Optimizer = field(default_factory=Optimizer)
    guard: Guard = field(default_factory=Guard)
    micro_tokens: int = 4096
    recompute: bool = True
    dtype: str = "bfloat16"
    probe_tokens: int = 4_194_304
    save_every: int = 250
    keep: int = 3
    seed: int = 0
    chat_template: str = ""
    scratch_tokens: int = 8_000_000_000_000
    teacher: str = ""

    def check(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        for name in ("micro_tokens", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for stage in self.stages:
            stage.check()

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    def stage(self, name: str) -> Stage | Halo:
        """The stage of that name; ValueError with the nearest name if there is none."""
        check_choice("stage", name, tuple(s.name for s in self.stages))
        return next(s for s in self.stages if s.name == name)
