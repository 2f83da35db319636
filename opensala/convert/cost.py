"""What a conversion takes on machines that are not here: FLOPs, hours and memory of each rank, from shapes.

Weights, gradients and moments are counted exactly; activations follow the tensors that each part keeps.
Nothing is loaded: a teacher's `config.json` is enough.
"""

import math
from dataclasses import dataclass

import torch

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.attention import LightningMixer
from ..model.config import LIGHTNING
from ..model.flops import forward_flops
from ..model.machines import check_machines, layer_bytes, mixer_bytes
from .config import ConvertConfig, Execution
from .opening import configured, number_kept
from .selection import select_layers
from .sweep import PASSES

_LOGITS = 3 * 4  # bytes of a logit in the loss: student's, teacher's, gradient
_PIECE = 1 << 27  # logits of one piece on a GPU (`kl`)
_MOMENTS = 16  # bytes a trained parameter: float32 weight, gradient, two moments


@dataclass(frozen=True)
class Part:
    """A part of a conversion: sequences of `length`, tokens and FLOPs in all, and bytes that one rank needs:
    `states` (weights, gradients, moments, sums), `gathered` (weights made whole for a moment), and
    `activations` of a pass with the loss."""

    name: str
    steps: int
    length: int
    tokens: int
    flops: float
    states: int
    gathered: int
    activations: int

    @property
    def memory(self) -> int:
        return self.states + self.gathered + self.activations


@dataclass(frozen=True)
class _Sizes:
    """Parameters of a model: of all layers, of the largest, and outside of them (embedding, norm, head)."""

    layers: int
    largest: int
    root: int

    @property
    def all(self) -> int:
        return self.layers + self.root


def conversion_parts(
    teacher: MiniCPMSALAConfig, config: ConvertConfig, ranks: int, execution: Execution | None = None
) -> list[Part]:
    """Calibration, alignment, sweep and distillation, those that the configuration has.

    Args:
        teacher: as `teacher_config` gives it.
        ranks: over which weights and states are sharded and sequences shared out.
    """
    count = _Counter(teacher, config, ranks, execution or Execution())
    parts = []
    if config.align.steps and config.calibrate != "none":
        parts.append(count.calibration())
    if config.align.steps:
        parts.append(count.alignment())
    if config.layers is None and config.rule in ("halo", "recall", "kl"):
        parts.append(count.sweep())
    parts += [
        count.distillation(name) for name, phase in config.phases().items() if name != "align" and phase.steps
    ]
    return parts


class _Counter:
    """Counts the parts of one conversion."""

    def __init__(
        self, teacher: MiniCPMSALAConfig, config: ConvertConfig, ranks: int, execution: Execution
    ) -> None:
        self.teacher, self.config, self.ranks, self.execution = teacher, config, ranks, execution
        self.layers = layers = teacher.num_hidden_layers
        keep = number_kept(config, layers)
        kept = (
            list(config.layers)
            if config.layers is not None
            else select_layers(None, keep, layers=layers, fix_ends=config.fix_ends, rule="uniform")
        )
        self.student = configured(config, teacher, kept)
        with torch.device("meta"):
            self.of_teacher = _sizes(MiniCPMSALAForCausalLM(teacher))
            model = MiniCPMSALAForCausalLM(self.student)
            self.of_student = _sizes(model)
            linear = configured(config, teacher, [])
            self.mixer = sum(p.numel() for p in LightningMixer(linear, 0).parameters())
        self.trained = self._trained(model)
        self.wide = 4 if config.compute == "float32" else 2
        self.dtype = 4 if config.dtype == "float32" else 2
        self.linear = linear

    def _trained(self, model: MiniCPMSALAForCausalLM) -> int:
        if self.config.trainable == "all":
            return sum(p.numel() for p in model.parameters())
        if self.config.trainable == "linear":
            return self.mixer * (self.student.mixer_types or []).count(LIGHTNING)
        wide, narrow, rank = model.config.intermediate_size, model.config.hidden_size, self.config.lora_rank
        mixers = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n or "norm" in n)
        return mixers + 3 * rank * (wide + narrow) * self.layers

    def _share(self, parameters: int, bytes_: int) -> int:
        """Of something that is sharded, what a rank holds."""
        return math.ceil(parameters / self.ranks) * bytes_

    def _pass(self, name: str) -> int:
        """Tokens of a pass of a phase on one rank."""
        phase, length = self.config.phases()[name], self.config.length_of(name)
        return length * self.execution.rows(math.ceil(phase.batch / self.ranks), length)

    def _gathered(self, sizes: _Sizes, trained: bool) -> int:
        """A model's root and two layers (the next one comes while one runs), with their gradients before they
        are shared out; nothing where there is one rank, whose weights are whole anyway."""
        if self.ranks == 1:
            return 0
        gradients = 4 + self.wide if trained else 0
        return self.wide * (sizes.root + 2 * sizes.largest) + gradients * 2 * sizes.largest

    def _mixers(self) -> int:
        return self._share(self.layers * self.mixer, _MOMENTS)

    def calibration(self) -> Part:
        """Sums of products of every layer, fitted and judged with, each on one rank, in float64."""
        inner = self.teacher.num_attention_heads * (self.teacher.head_dim or 0)
        sums = 8 * inner * (inner + self.teacher.hidden_size)
        own = math.ceil(self.layers / self.ranks)
        tokens = 2 * max(self.config.calibrate_tokens, 8 * inner)  # at the start, and behind the alignment
        length = self.config.length_of("align")
        flops = tokens * (self._forward(length) + self.layers * (2 * self.mixer + sums / 4))
        states = self._share(self.of_teacher.all, self.dtype) + self._mixers() + 2 * own * sums
        gathered = self._gathered(self.of_teacher, False) + 3 * sums + self.wide * self.mixer
        activations = self._pass("align") * layer_bytes(self.linear, self.wide)
        return Part("calibration", 2, length, tokens, flops, states, gathered, activations)

    def _forward(self, length: int) -> float:
        return forward_flops(self.teacher, length, False)

    def alignment(self) -> Part:
        """The teacher forwards; one mixer's graph at a time, each with its moments."""
        phase, length = self.config.align, self.config.length_of("align")
        tokens = phase.steps * phase.batch * length
        flops = tokens * (self._forward(length) + 6 * self.layers * self.mixer)
        states = self._share(self.of_teacher.all, self.dtype) + self._mixers()
        gathered = self._gathered(self.of_teacher, False)
        gathered += (2 * self.wide + 4) * self.mixer if self.ranks > 1 else 0
        here = self._pass("align")
        activations = here * (layer_bytes(self.linear, self.wide) + mixer_bytes(self.linear, self.wide))
        return Part("alignment", phase.steps, length, tokens, flops, states, gathered, activations)

    def sweep(self) -> Part:
        """Forward passes of teacher and mixers; the documents' states before the layer of the moment stay."""
        probes = self.config.probes
        tokens = 2 * probes.sequences * probes.length
        passes = PASSES * self.layers + 2
        flops = passes * tokens * (self._forward(probes.length) + self.layers * self.mixer)
        states = self._share(self.of_teacher.all, self.dtype) + self._share(self.layers * self.mixer, 4)
        states += 3 * math.ceil(tokens / self.ranks) * self.teacher.hidden_size * self.dtype
        gathered = self._gathered(self.of_teacher, False) + self.wide * 2 * self.mixer
        here = probes.length * min(probes.batch, probes.sequences)
        activations = here * layer_bytes(self.linear, self.wide) + self._logits(here)
        return Part(
            "sweep", self.layers, probes.length, round(passes * tokens), flops, states, gathered, activations
        )

    def _logits(self, tokens: int) -> int:
        return _LOGITS * min(tokens * self.teacher.vocab_size, _PIECE)

    def distillation(self, name: str) -> Part:
        """Teacher forwards, student both ways; logits in pieces."""
        phase, length = self.config.phases()[name], self.config.length_of(name)
        tokens, here = phase.steps * phase.batch * length, self._pass(name)
        student = forward_flops(self.student, length, phase.sparse)
        frozen = max(0, self.of_student.layers - self.trained)
        flops = tokens * (self._forward(length) + 3 * student - 2 * frozen)
        states = self._share(self.of_teacher.all, self.dtype) + self._share(self.of_student.all, 4)
        states += self._share(self.trained, _MOMENTS - 4)
        head = self.teacher.vocab_size * self.teacher.hidden_size
        gathered = self._gathered(self.of_teacher, False) + self._gathered(self.of_student, True)
        gathered += head * self.dtype if self.ranks > 1 else 0
        layer = here * layer_bytes(self.student, self.wide)
        kept = here * self.student.hidden_size * self.wide * self.layers
        activations = layer + kept if self.execution.recompute else layer * self.layers
        activations += self._logits(here) + 8 * here * self.student.hidden_size
        activations += 4 * head if self.config.trainable == "all" else 0
        shown = "distillation" if name == "distill" else name
        return Part(shown, phase.steps, length, tokens, flops, states, gathered, activations)


def _sizes(model: MiniCPMSALAForCausalLM) -> _Sizes:
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    return _Sizes(sum(layers), max(layers), sum(p.numel() for p in model.parameters()) - sum(layers))


def hours(part: Part, gpus: int, device: str, mfu: float) -> float:
    """Of a part on so many GPUs that reach a share of their FLOP/s."""
    return part.flops / (gpus * check_machines(gpus, device, mfu).flops * mfu) / 3600


def fits(part: Part, device: str) -> bool:
    """Whether a rank's share fits its device, a tenth of which the libraries take."""
    return part.memory < 0.9 * check_machines(1, device, 1.0).memory
