"""What every part of a conversion works with: configuration, processes, folder, teacher, mixers, data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..model import MiniCPMSALAForCausalLM
from ..model.flops import matmul_flops_per_second
from ..runs import RunFolder, require_matplotlib
from .batches import Batches
from .compute import autocast, choose_compute
from .config import ConvertConfig, Execution, RunIdentity
from .files import RunFiles
from .loop import Clock, PhaseLoop, Settings
from .opening import check_ranks, check_texts, configured, device_of, number_kept, tokenizer_of
from .probes import Prober
from .ranks import Ranks
from .teacher import check_vocabulary, load_teacher, read_config, teacher_config
from .tokens import Sample
from .transfer import assemble, lightning_mixers

_TIMED_STEPS = 20  # a phase of fewer is not worth measuring the machine for


class Work:
    """A conversion in progress. Arguments as of `convert`; everything that can be refused is refused here,
    and nothing is written before."""

    def __init__(
        self,
        config: ConvertConfig,
        output: str | Path,
        resume: bool,
        quiet: bool,
        execution: Execution,
        ranks: Ranks,
    ) -> None:
        config.check()
        require_matplotlib()
        self.config, self.execution, self.ranks = config, execution, ranks
        self.quiet = quiet or ranks.rank > 0
        self.clock = Clock(execution.seconds, ranks)
        shape = teacher_config(read_config(config.teacher))
        self.keep = number_kept(config, shape.num_hidden_layers)
        configured(config, shape, list(range(self.keep)))  # refuses what a hybrid cannot be
        self.device = device_of(config.device, ranks)
        self.tokenizer = tokenizer_of(config.teacher)
        check_vocabulary(self.tokenizer, shape, f"teacher: {config.teacher}")
        self.batches = Batches(self.tokenizer, config)
        self.prober = Prober(self.batches, config.probes, ranks)
        check_texts(config, self.batches.fingerprint, Path(output))
        self.folder: RunFolder | None = None
        ranks.first(lambda: self._open(Path(output), resume))
        self.files = RunFiles(Path(output), self.folder, ranks)
        self._peak: float | None = None

    def _open(self, output: Path, resume: bool) -> None:
        self.folder = RunFolder(output, RunIdentity(self.config, self.batches.fingerprint), resume)

    @property
    def path(self) -> Path:
        return self.files.path

    def load(self) -> None:
        """The teacher and fresh mixers, once the folder is ours."""
        config = self.config
        at_first = self.device if self.ranks.world == 1 else torch.device("cpu")  # shards go to the device
        teacher = load_teacher(config.teacher, getattr(torch, config.dtype), at_first)
        self._fill_end_of_text(teacher)
        mixers = lightning_mixers(teacher, config.lightning_nkv)
        self.compute = self._chosen_compute(teacher)
        check_ranks(config, self.compute, self.ranks)
        self.teacher: MiniCPMSALAForCausalLM = self.ranks.shard(teacher, self.compute)
        self.mixers = self.ranks.shard_mixers(mixers, self.compute)

    def _fill_end_of_text(self, teacher: MiniCPMSALAForCausalLM) -> None:
        """A teacher that names no end of text takes its tokenizer's."""
        if (
            read_config(self.config.teacher).get("eos_token_id") is None
            and self.tokenizer.eos_token_id is not None
        ):
            teacher.config.eos_token_id = self.tokenizer.eos_token_id

    def _chosen_compute(self, teacher: MiniCPMSALAForCausalLM) -> str:
        """The precision of products: what the run began with, so that a resumed one has the same numbers."""
        shape, known = teacher.config, self.files.read("compute.json")
        if known is None:
            known = self.ranks.first(
                lambda: choose_compute(
                    self.config.compute, self.device, shape.hidden_size, shape.intermediate_size
                )
            )
            if self.config.compute == "auto":
                self.files.write("compute.json", known)
        return str(known)

    def student(self, kept: list[int]) -> MiniCPMSALAForCausalLM:
        """The hybrid with these layers kept and the mixers as they are; whole, in float32."""
        built = configured(self.config, self.teacher.config, kept)
        student = assemble(self.teacher, built, dict(enumerate(self.mixers)), torch.float32)
        student.set_attention_mode("dense")  # until a phase says otherwise; small teachers set dense_len low
        return student

    def batch(self, phase: str, step: int) -> Sample:
        """All sequences of a step."""
        return self.batches.train(phase, step, self.config.phases()[phase].batch)

    def loop(
        self,
        name: str,
        weights: nn.Module,
        flops: float,
        validate: Callable[[], dict[str, float]] | None = None,
        before: Callable[[int], None] | None = None,
    ) -> PhaseLoop:
        """The loop of a phase. `flops`: of a token, forwards and backwards."""
        config, phase = self.config, self.config.phases()[name]
        if phase.steps >= _TIMED_STEPS and self._peak is None:
            self._peak = matmul_flops_per_second(self.device, getattr(torch, self.compute))
        settings = Settings(
            name,
            phase,
            config.length_of(name),
            self.device,
            config.save_every,
            config.validate_every,
            flops,
            (self._peak or 0.0) * self.ranks.world,
        )
        return PhaseLoop(
            self.files,
            settings,
            self.execution,
            self.clock,
            lambda step: self.batch(name, step),
            weights,
            validate=validate,
            before=before,
            quiet=self.quiet,
        )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Products as in training."""
        with autocast(self.compute, self.device):
            yield
