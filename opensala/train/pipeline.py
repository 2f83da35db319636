"""A whole recipe in one folder: the softmax Transformer (if the recipe trains one), HALO, every stage, the
finished model.

config.json       recipe, teacher, sources: a resumed run must have the same
metrics.jsonl     a line for each step of each stage
dense/            the Transformer to convert; halo/ the conversion's own run folder
stages.json       loss on the same sequences before and after each stage
checkpoints/      the newest states
models/STAGE/     the model at the end of each stage; model/ that of the last one
plots/training.png
"""

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..convert.export import save_weights
from ..convert.teacher import check_place, check_vocabulary, read_config, teacher_config
from ..data.encode import Encoder
from ..data.pack import is_packed, parse_sources
from ..hub import checkpoint_folder
from ..model import MiniCPMSALAForCausalLM
from ..model.config import check_choice
from ..model.flops import matmul_flops_per_second
from ..parallel import (
    ParallelConfig,
    ParallelMesh,
    close_parallel,
    init_parallel,
    whole_weights,
)
from ..runs import RunFolder, read_json, require_matplotlib, write_errors, write_json
from .checkpoints import Checkpoint, Checkpoints
from .conversion import run_halo
from .data import StageData
from .data.batches import check_source
from .memory import check_fits
from .plan import check_world
from .recipe import Halo, Recipe, Stage
from .start import RunConfig, Start, begun_with, own_transformer, reduced
from .steps import StepBatch
from .trainer import Signals, StageRun
from .watch import Board, plot_training

logger = logging.getLogger("opensala")
SHIPPED = (
    Path(__file__).parents[1] / "assets" / "small"
)  # the tokenizer of recipes that train their own Transformer
_MUP_RATE = 1e-3  # from here on a rate is one of muP's, which is divided by width for matrices


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    start: Start | None = None,
    only: Sequence[str] = (),
    resume: bool = False,
    device: str | None = None,
    skip_bad: bool = False,
    chat_template: str = "",
    quiet: bool = False,
) -> Path:
    """Run a recipe; returns the folder of the last finished model.

    Args:
        recipe: what to do.
        output: folder of the run.
        start: what to begin with.
        only: names of stages to run, all if empty; those before them must be finished.
        resume: resume a run that was stopped.
        device: cpu or cuda; None for a GPU if there is one.
        skip_bad: count and leave out malformed documents.
        chat_template: for a tokenizer that has none (before the recipe's own).
        quiet: no progress bars.

    Raises:
        ValueError: see the modules for each kind of bad input; a folder that another process works in, or
            that cannot be written. Nothing that was saved is overwritten.
        Stopped: a signal came and the state was saved.
    """
    start = begun_with(recipe, start or Start())
    for name in only:
        recipe.stage(name)
    recipe = reduced(recipe, start)
    recipe.check()
    require_matplotlib()
    for stage in recipe.stages:
        for source in stage.mixture if isinstance(stage, Stage) else ():
            check_source(source)
        if isinstance(stage, Halo) and stage.config.data and not is_packed(stage.config.data[0]):
            parse_sources(stage.config.data)
    with write_errors(Path(output), "go on with --resume"):
        run = Pipeline(recipe, Path(output), start, resume, device, skip_bad, chat_template, quiet)
        with run.folder.held() if run.folder is not None else nullcontext():
            try:
                return run.run(only)
            finally:
                run.close()


class Pipeline:
    """A run in progress. See `train`."""

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        start: Start,
        resume: bool,
        device: str | None,
        skip_bad: bool,
        chat_template: str,
        quiet: bool,
    ) -> None:
        self.recipe, self.path, self.start, self.device, self.skip_bad = recipe, path, start, device, skip_bad
        self.chat_template, self.quiet = chat_template, quiet
        self._check_start()
        for stage in recipe.stages:
            if isinstance(stage, Stage) and stage.chat:  # now, not after the stages before it
                Encoder(self.tokenizer(stage), True)
        self.mesh = init_parallel(ParallelConfig(), device=device)
        for stage in recipe.stages:
            if isinstance(stage, Stage):
                check_world(stage, self.mesh.world)
        self.folder = _open_folder(path, RunConfig(recipe, start), resume, self.mesh)
        self.checkpoints = Checkpoints(path, recipe.keep)
        self.signals = Signals()
        self.board = Board(path / "tensorboard") if self.folder is not None else None
        self._measured_flops = 0.0

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        close_parallel()

    def _check_start(self) -> None:
        """Refuse a teacher or a model to begin with that is not there, before anything is written."""
        if self.start.init:
            check_place("init", self.start.init)
        if self.start.teacher:
            config = teacher_config(read_config(self.start.teacher))
            check_vocabulary(self.tokenizer(self.recipe.stages[0]), config, f"teacher: {self.start.teacher}")

    def run(self, only: Sequence[str]) -> Path:
        names = [s.name for s in self.recipe.stages]
        for name in only:
            check_choice("stage", name, tuple(names))
        try:
            return self._run(names, only)
        finally:
            self._plot()

    def _plot(self) -> None:
        """The curves of all steps there are."""
        records = [] if self.folder is None else self.folder.metrics()
        if records:
            probes = read_json(self.path / "stages.json") or {}
            plot_training(
                records,
                [s for s in self.recipe.stages if isinstance(s, Stage)],
                probes,
                self.path / "plots" / "training.png",
            )

    def _run(self, names: Sequence[str], only: Sequence[str]) -> Path:
        result = self.path
        for index, stage in enumerate(self.recipe.stages):
            if not self.finished(stage):
                if only and stage.name not in only:
                    wanted = [n for n in names[index:] if n in only]
                    if wanted:
                        raise ValueError(
                            f"stage {wanted[0]} begins where {stage.name} ends, and {self.path} holds no "
                            f"finished {stage.name}: run that "
                            f"first (--stage {stage.name}), or begin from a model with --init"
                        )
                    break
                self.run_stage(index, stage)
            result = self.model_of(stage)
        if self.finished(self.recipe.stages[-1]):
            result = self._publish(result)
        return result

    def model_of(self, stage: Stage | Halo) -> Path:
        """Where the model at the end of a stage is."""
        return self.path / "halo" / "model" if isinstance(stage, Halo) else self.path / "models" / stage.name

    def finished(self, stage: Stage | Halo) -> bool:
        return (self.model_of(stage) / "config.json").exists()

    def run_stage(self, index: int, stage: Stage | Halo) -> None:
        if isinstance(stage, Halo):
            run_halo(
                self.recipe,
                stage,
                self.start.teacher or str(self.path / "models" / self.recipe.stages[0].name),
                self.path,
                self.mesh,
                device=self.device,
                skip_bad=self.skip_bad,
                quiet=self.quiet,
            )
            return
        mesh = init_parallel(ParallelConfig(cp=stage.cp), device=self.device)
        tokenizer = self.tokenizer(stage)
        model = self._model(index, stage)
        check_vocabulary(tokenizer, model.config, stage.name)
        check_fits(model.config, self.recipe, stage, mesh.device, mesh.world)
        if mesh.rank == 0 and model.config.logit_divisor == 1 and stage.schedule.peak >= _MUP_RATE:
            logger.warning(
                "%s: this model has no muP scaling (dim_model_base is its hidden size), so matrices learn "
                "at %g itself, not at a fraction of it: models without it are trained at 1e-5 to 5e-4; set "
                "%s.peak and %s.last",
                stage.name,
                stage.schedule.peak,
                stage.name,
                stage.name,
            )
        data = StageData(stage, tokenizer, self.recipe.seed, self.skip_bad)
        run = StageRun(
            self.recipe,
            stage,
            index,
            model,
            data,
            mesh,
            self.folder,
            self.checkpoints,
            self._flops_per_second(mesh),
            self.quiet,
        )
        run.begin(self._before(index))
        probe = self._probe(stage, tokenizer)
        self._measure("before", run, probe)
        with self.signals.watched():
            run.run(self.signals, self.board)
        self._measure("after", run, probe)
        self._export(stage, run.model, tokenizer, mesh)

    def _probe(self, stage: Stage, tokenizer: Any) -> StepBatch | None:
        """Sequences of the stage's mixture to measure with."""
        count = -(-self.recipe.probe_tokens // stage.sequence)
        if not count:
            return None
        data = StageData(stage, tokenizer, self.recipe.seed, self.skip_bad, probe=True)
        return StepBatch([data.next() for _ in range(count)], {}, 0)

    def _measure(self, when: str, run: StageRun, probe: StepBatch | None) -> None:
        """Note the loss on the probe, before the stage's first step or after its last."""
        if probe is None or (when == "before" and run.step):
            return
        loss = run.probe(probe)
        if self.mesh.rank == 0:
            known = read_json(self.path / "stages.json") or {}
            known.setdefault(run.stage.name, {})[when] = loss
            write_json(self.path / "stages.json", known)

    def _flops_per_second(self, mesh: ParallelMesh) -> float:
        if not self._measured_flops:
            self._measured_flops = matmul_flops_per_second(mesh.device, getattr(torch, self.recipe.dtype))
        return self._measured_flops

    # --- what a stage begins with ---

    def _before(self, index: int) -> Checkpoint | None:
        """The last checkpoint of the stage before, if that trained the same model."""
        if index == 0 or not isinstance(self.recipe.stages[index - 1], Stage):
            return None
        return self.checkpoints.last(self.recipe.stages[index - 1].name)

    def _model(self, index: int, stage: Stage) -> MiniCPMSALAForCausalLM:
        """A model of the stage's architecture in float32, with the weights of the model before it."""
        if stage.dense_start:
            torch.manual_seed(self.recipe.seed)
            return MiniCPMSALAForCausalLM(teacher_config(own_transformer(self.recipe)))
        path = self.model_of(self.recipe.stages[index - 1]) if index else checkpoint_folder(self.start.init)
        return MiniCPMSALAForCausalLM.from_pretrained(path, dtype=torch.float32)

    def tokenizer(self, stage: Stage | Halo) -> Any:
        """The run's tokenizer, with a chat template from the first chat stage on."""
        source = self.start.init or self.start.teacher or SHIPPED
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(source))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source} has no tokenizer that can be read ({error}); save one beside the model"
            ) from error
        if isinstance(stage, Stage) and stage.chat and (self.chat_template or not tokenizer.chat_template):
            tokenizer.chat_template = self.chat_template or self.recipe.chat_template or None
        return tokenizer

    # --- what it leaves ---

    def _export(self, stage: Stage, model: Any, tokenizer: Any, mesh: ParallelMesh) -> None:
        """The stage's model as a checkpoint folder that everything else loads, in the recipe's dtype."""
        weights = whole_weights(model)
        if mesh.rank == 0:
            target, partial = self.model_of(stage), self.path / "models" / f"{stage.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            dtype = getattr(torch, self.recipe.dtype)
            mode = model.config.attention_mode
            model.config.attention_mode = mode if stage.dense_start else "auto"
            save_weights(partial, model, weights, dtype)
            model.config.attention_mode = mode
            if stage.dense_start:
                write_json(partial / "config.json", own_transformer(self.recipe))
            tokenizer.save_pretrained(partial)
            partial.replace(target)
        if mesh.world > 1:
            torch.distributed.barrier()

    def _publish(self, source: Path) -> Path:
        target = self.path / "model"
        if self.mesh.rank == 0 and not target.exists():
            partial = self.path / "model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.replace(target)
        return target


def _open_folder(path: Path, config: RunConfig, resume: bool, mesh: ParallelMesh) -> RunFolder | None:
    """The run's folder on rank 0, which alone writes to it; None on the others, once it is there."""
    folder = RunFolder(path, config, resume, "training") if mesh.rank == 0 else None
    if mesh.world > 1:
        torch.distributed.barrier()
    return folder


def summary(path: Path) -> str:
    """A line for each stage: the loss on its probe before and after."""
    record = read_json(path / "stages.json") or {}
    return "\n".join(
        f"{name}: loss {own['before']:.3f} -> {own['after']:.3f}"
        for name, own in record.items()
        if "after" in own
    )
