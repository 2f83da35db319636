"""What a conversion does: one frozen configuration, and the recipes that fill it.

`sala` is the paper's way (arXiv 2602.11761), `halo` that of arXiv 2601.22156; `tiny` takes either down to
what a laptop does in minutes.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..model.config import check_choice
from .selection import RULES

TRAINABLE = ("linear", "all")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on `batch` sequences, the rate rising over `warmup` steps, then a cosine from
    `lr` to `last_lr`."""

    steps: int
    batch: int
    lr: float
    last_lr: float
    warmup: int = 50

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.last_lr + (self.lr - self.last_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


@dataclass(frozen=True)
class Probes:
    """The built-in measurements: `sequences` documents of `length` tokens with hidden facts, and as many of
    held-out text.

    `recall_tasks` and `general_tasks` name tasks of lm-eval to score with instead.
    """

    length: int = 512
    sequences: int = 48
    batch: int = 8
    recall_tasks: tuple[str, ...] = ()
    general_tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertConfig:
    """A whole conversion. Anything here that differs makes it another run.

    Attributes:
        teacher: folder or hub name.
        keep: layers that stay softmax attention; None for 25%.
        layers: these very layers instead of a choice.
        hype: take the rotary positions out of the kept layers.
        data: text files or folders; none for the texts of the Python installation.
        task_share: share of training sequences with hidden facts and questions (the generator of
            `opensala.data`).
        trainable: of the distillation: `linear` (SALA: the Lightning mixers) or `all` (HALO).
        dtype: of the teacher; what is trained is float32.
        cache_teacher: compute the teacher's final hidden states once and keep them on disk, instead of
            running it beside.
        reuse: a finished run whose aligned mixers and scores are taken over.
    """

    teacher: str
    keep: int | None = None
    layers: tuple[int, ...] | None = None
    rule: str = "halo"
    fix_ends: bool = True
    hype: bool = True
    attn_qk_norm: bool = False
    attn_scale_base: float | None = None
    sparse_config: dict[str, Any] = field(default_factory=dict)
    length: int = 512
    align: Phase = field(default_factory=lambda: Phase(20_000, 32, 1e-3, 1e-5))
    distill: Phase = field(default_factory=lambda: Phase(26_500, 96, 1e-4, 1e-5))
    trainable: str = "linear"
    probes: Probes = field(default_factory=Probes)
    data: tuple[str, ...] = ()
    task_share: float = 0.25
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    cache_teacher: bool = False
    reuse: str | None = None
    save_every: int = 100

    def check(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        check_choice("rule", self.rule, RULES)
        check_choice("trainable", self.trainable, TRAINABLE)
        check_choice("dtype", self.dtype, DTYPES)
        for name, value, least in (
            ("length", self.length, 16),
            ("probes.length", self.probes.length, 128),
            ("probes.sequences", self.probes.sequences, 1),
            ("probes.batch", self.probes.batch, 1),
            ("align.steps", self.align.steps, 0),
            ("align.batch", self.align.batch, 1),
            ("distill.steps", self.distill.steps, 0),
            ("distill.batch", self.distill.batch, 1),
            ("save_every", self.save_every, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, rate in (("align.lr", self.align.lr), ("distill.lr", self.distill.lr)):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name} must be a number above 0, got {rate}")
        if not 0 <= self.task_share <= 1:
            raise ValueError(f"task_share must be 0 to 1, got {self.task_share}")
        if self.task_share and self.length < 128:
            raise ValueError(
                f"length must be at least 128 tokens for sequences with hidden facts, got {self.length}: "
                "or set task_share to 0"
            )

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: tuples are lists."""
        record = asdict(self)
        record["data"] = list(self.data)
        record["layers"] = None if self.layers is None else list(self.layers)
        for name in ("recall_tasks", "general_tasks"):
            record["probes"][name] = list(record["probes"][name])
        return record


@dataclass(frozen=True)
class RunIdentity:
    """What a run folder must have been made with: the configuration, and the fingerprint of the texts."""

    config: ConvertConfig
    texts: str

    def as_dict(self) -> dict[str, Any]:
        return {**self.config.as_dict(), "texts": self.texts}


def sala(teacher: str) -> ConvertConfig:
    """MiniCPM-SALA's conversion: ends kept, only the Lightning mixers distilled, 1.3B tokens of 512."""
    return ConvertConfig(teacher)


def halo(teacher: str) -> ConvertConfig:
    """HALO as published: no fixed ends, everything trainable in the distillation, 20,000 steps of 96
    sequences."""
    return replace(sala(teacher), fix_ends=False, trainable="all", distill=Phase(20_000, 96, 1e-4, 1e-5))


def tiny(config: ConvertConfig) -> ConvertConfig:
    """The same for a teacher of a few million parameters, in minutes on a CPU."""
    return replace(
        config,
        align=Phase(300, 8, 3e-3, 1e-4, warmup=20),
        distill=Phase(300, 8, 1e-3, 5e-5, warmup=20),
        probes=replace(config.probes, sequences=24),
        save_every=50,
    )


RECIPES = {
    "sala": sala,
    "halo": halo,
    "tiny": lambda teacher: tiny(sala(teacher)),
    "tiny-halo": lambda teacher: tiny(halo(teacher)),
}
