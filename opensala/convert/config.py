"""What a conversion does: one frozen configuration, the recipes that fill it, and how a machine carries it
out.

`sala` is the paper's way (arXiv 2602.11761), `halo` that of arXiv 2601.22156; `tiny` takes either down to
what a laptop does in minutes, and `smollm2_135m` is for SmolLM2-135M and a GPU that is lent for minutes.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..model.config import check_choice
from .calibrate import KINDS
from .compute import COMPUTE
from .selection import RULES

TRAINABLE = ("linear", "lora", "all")
DTYPES = ("float32", "bfloat16", "float16")
DECAYS = ("cosine", "linear")


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on `batch` sequences, the rate rising over `warmup` steps and then falling from
    `lr` to `last_lr`.

    Attributes:
        decay: `cosine` or `linear`.
        length: tokens per sequence; the conversion's if None.
        task_share: share of sequences with hidden facts; the conversion's if None.
        seconds: the phase ends after so many seconds of training, if that is before its last step; the rate
            then falls with the time, so that it has fallen when the time is over.
        sparse: sequences from `dense_len` tokens on attend sparsely in the student (else all densely).
        answer_weight: what a token of an answer counts in the divergence; others count 1.
        cross_entropy: what a token of an answer counts in the cross-entropy that is added to it.
        teacher_length: sequences longer than this are not shown to the teacher: only their answers count,
            by cross-entropy. No limit if None.
    """

    steps: int
    batch: int
    lr: float
    last_lr: float
    warmup: int = 50
    decay: str = "cosine"
    length: int | None = None
    task_share: float | None = None
    seconds: float | None = None
    sparse: bool = False
    answer_weight: float = 1.0
    cross_entropy: float = 0.0
    teacher_length: int | None = None

    def rate(self, step: int, share: float = 0.0) -> float:
        """The learning rate of step `step`, counted from 0, when `share` of the phase's time is over."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, max(share, (step - self.warmup) / max(1, self.steps - self.warmup)))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.last_lr + (self.lr - self.last_lr) * left

    def for_tokens(self, tokens: int, length: int, name: str) -> "Phase":
        """The same with as many steps as so many tokens make; `length` is the conversion's.

        Raises ValueError for less than one batch.
        """
        one = self.batch * (self.length or length)
        if tokens < one:
            raise ValueError(
                f"{name}.tokens must be at least a batch of {self.batch} sequences of "
                f"{self.length or length} tokens, {one:,}, got {tokens:,}"
            )
        return replace(self, steps=tokens // one)

    def check(self, name: str) -> None:
        """Raise ValueError for the first field that cannot be."""
        check_choice(f"{name}.decay", self.decay, DECAYS)
        for key, value, least in (
            ("steps", self.steps, 0),
            ("batch", self.batch, 1),
            ("warmup", self.warmup, 0),
            ("length", 16 if self.length is None else self.length, 16),
            ("answer_weight", self.answer_weight, 0),
            ("cross_entropy", self.cross_entropy, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name}.{key} must be at least {least}, got {value}")
        for key, number in (("lr", self.lr), ("last_lr", self.last_lr), ("seconds", self.seconds)):
            if number is not None and not (math.isfinite(number) and (number > 0 or key == "last_lr")):
                raise ValueError(f"{name}.{key} must be a number above 0, got {number}")


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
        hype_fade: tokens of distillation over which they fade out; 0 takes them out at once.
        lightning_nkv: k and v heads of the converted layers; as many as query heads if None.
        data: text files or folders; none for the texts of the Python installation.
        tokens: files or folders of packed tokens instead of `data` for training (see `convert.tokens`).
        task_share: share of training sequences with hidden facts and questions (the generator of
            `opensala.data`).
        calibrate: how the mixers' output projections are fitted before the alignment: `ridge`, `scalar` or
            `none`; after it `ridge` fits them once more.
        calibrate_tokens: on how many tokens.
        trainable: of the distillation: `linear` (SALA: the Lightning mixers), `lora` (they, the attention of
            kept layers, all norms, and low-rank changes of the feed-forwards) or `all` (HALO).
        lora_rank: of those changes.
        long: another phase behind the distillation, of longer sequences.
        clip: norm to which gradients are clipped, those of the alignment layer by layer.
        dtype: of the teacher and of the result; what is trained is float32.
        compute: precision of products: `float32`, `bfloat16` or `auto` (see `convert.compute`).
        cache_teacher: compute the teacher's final hidden states of the distillation once and keep them on
            disk, instead of running it beside.
        reuse: a finished run whose aligned mixers and scores are taken over.
        start: folder of the outcome of an earlier conversion of this teacher, which is trained on instead of
            aligned mixers (see `convert.continuing`).
        save_every: steps between saved states.
        validate_every: steps between measurements on held-out probes in the distillation; 0 for none.
    """

    teacher: str
    keep: int | None = None
    layers: tuple[int, ...] | None = None
    rule: str = "halo"
    fix_ends: bool = True
    hype: bool = True
    hype_fade: int = 0
    attn_qk_norm: bool = False
    attn_scale_base: float | None = None
    sparse_config: dict[str, Any] = field(default_factory=dict)
    lightning_nkv: int | None = None
    length: int = 512
    calibrate: str = "ridge"
    calibrate_tokens: int = 8192
    align: Phase = field(default_factory=lambda: Phase(20_000, 32, 1e-3, 1e-5))
    distill: Phase = field(default_factory=lambda: Phase(20_000, 96, 1e-4, 1e-5))
    long: Phase | None = None
    trainable: str = "linear"
    lora_rank: int = 16
    clip: float = 1.0
    probes: Probes = field(default_factory=Probes)
    data: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    task_share: float = 0.25
    seed: int = 0
    dtype: str = "float32"
    compute: str = "auto"
    device: str = "cpu"
    cache_teacher: bool = False
    reuse: str | None = None
    start: str | None = None
    save_every: int = 100
    validate_every: int = 0

    def phases(self) -> dict[str, Phase]:
        """All phases that train, by name, in order."""
        found = {"align": self.align, "distill": self.distill}
        return found if self.long is None else {**found, "long": self.long}

    def length_of(self, phase: str) -> int:
        """Tokens per sequence of a phase."""
        return self.phases()[phase].length or self.length

    def check(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name, choice, allowed in (
            ("rule", self.rule, RULES),
            ("trainable", self.trainable, TRAINABLE),
            ("dtype", self.dtype, DTYPES),
            ("compute", self.compute, COMPUTE),
            ("calibrate", self.calibrate, KINDS),
        ):
            check_choice(name, choice, allowed)
        for name, value, least in (
            ("length", self.length, 16),
            ("probes.length", self.probes.length, 128),
            ("probes.sequences", self.probes.sequences, 1),
            ("probes.batch", self.probes.batch, 1),
            ("hype_fade", self.hype_fade, 0),
            ("calibrate_tokens", self.calibrate_tokens, 1),
            ("lora_rank", self.lora_rank, 1),
            ("save_every", self.save_every, 1),
            ("validate_every", self.validate_every, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.start is not None and self.reuse is not None:
            raise ValueError("start and reuse both say what distillation begins with: drop one of the two")
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be a number above 0, got {self.clip}")
        for name, phase in self.phases().items():
            phase.check(name)
            self._check_tasks(name, phase)

    def _check_tasks(self, name: str, phase: Phase) -> None:
        share, where = self.task_share, "task_share"
        if phase.task_share is not None:
            share, where = phase.task_share, f"{name}.task_share"
        if not 0 <= share <= 1:
            raise ValueError(f"{where} must be 0 to 1, got {share}")
        length = phase.length or self.length
        if share and length < 128:
            raise ValueError(
                f"length must be at least 128 tokens for sequences with hidden facts, got {length}: "
                f"or set {where} to 0"
            )
        blind = phase.teacher_length is not None and length > phase.teacher_length
        if blind and not phase.cross_entropy:
            raise ValueError(
                f"{name}: sequences of {length} tokens are longer than teacher_length = "
                f"{phase.teacher_length}, so only answers can teach: set {name}.cross_entropy above 0"
            )

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: tuples are lists."""
        record = asdict(self)
        for name in ("data", "tokens"):
            record[name] = list(record[name])
        record["layers"] = None if self.layers is None else list(self.layers)
        for name in ("recall_tasks", "general_tasks"):
            record["probes"][name] = list(record["probes"][name])
        return record


@dataclass(frozen=True)
class Execution:
    """How this machine carries a conversion out, which may differ from one resumption to the next.

    Attributes:
        seconds: stop cleanly after so many seconds, with a saved state.
        micro_tokens: tokens of one forward and backward pass, at least one sequence; the rest of a step's
            batch follows in further passes. Another number gives sums of another order, so other last bits.
        recompute: keep the inputs of layers only and compute them again in the backward pass.
        log_every: steps between lines of the metrics. What lies between costs no wait for the GPU; a loss
            that is not finite is found at the next line.
        backend: of all ops (`opensala.ops.backends`); chosen by device if None.
    """

    seconds: float | None = None
    micro_tokens: int = 4096
    recompute: bool = False
    log_every: int = 1
    backend: str | None = None

    def check(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name, value in (("micro_tokens", self.micro_tokens), ("log_every", self.log_every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds must be a number above 0, got {self.seconds}")

    def rows(self, batch: int, length: int) -> int:
        """Sequences of a pass."""
        return max(1, min(batch, self.micro_tokens // length))


@dataclass(frozen=True)
class RunIdentity:
    """What a run folder must have been made with: the configuration, and the fingerprint of the texts."""

    config: ConvertConfig
    texts: str

    def as_dict(self) -> dict[str, Any]:
        return {**self.config.as_dict(), "texts": self.texts}


def sala(teacher: str) -> ConvertConfig:
    """MiniCPM-SALA's conversion: ends kept, only the Lightning mixers distilled; 1.31B tokens of 512 in all,
    0.33B of them alignment."""
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


def smollm2_135m(teacher: str) -> ConvertConfig:
    """SmolLM2-135M (30 layers) in about ten minutes of a GPU: 3M tokens of alignment, 40M of distillation and
    4M of long sequences, each of them ended by its time if that is over first.

    Kept are both ends and the layers whose replacement costs most (docs/conversion.md). k and v of the
    converted layers stay in the teacher's three groups and the feed-forwards change by rank 16 only, so that
    what differs from the teacher is small enough to ship.
    """
    return ConvertConfig(
        teacher,
        layers=(0, 6, 17, 18, 20, 21, 23, 29),
        lightning_nkv=3,
        calibrate_tokens=65_536,
        align=Phase(96, 64, 2e-3, 1e-4, warmup=5, length=512, seconds=45, task_share=0.25),
        distill=Phase(
            610,
            64,
            1e-3,
            5e-5,
            warmup=20,
            length=1024,
            seconds=330,
            task_share=0.35,
            answer_weight=2.0,
            cross_entropy=0.25,
        ),
        long=Phase(
            64,
            16,
            2e-4,
            1e-5,
            warmup=5,
            decay="linear",
            length=4096,
            seconds=90,
            task_share=0.6,
            sparse=True,
            answer_weight=2.0,
            cross_entropy=0.5,
            teacher_length=8192,
        ),
        trainable="lora",
        # Its copying heads match single tokens, which a mean over 32 keys hides (docs/smollm2.md).
        sparse_config={
            "dense_len": 4096,
            "kernel_size": 4,
            "kernel_stride": 2,
            "topk": 64,
            "window_size": 1024,
        },
        probes=Probes(512, 32, 16),
        save_every=200,
        validate_every=100,
    )


RECIPES = {
    "sala": sala,
    "halo": halo,
    "tiny": lambda teacher: tiny(sala(teacher)),
    "tiny-halo": lambda teacher: tiny(halo(teacher)),
    "smollm2_135m": smollm2_135m,
}
