"""The whole conversion as one run that can be stopped anywhere: alignment, sweep, choice of layers,
distillation, export.

Each phase saves its state every so many steps; a run that resumes takes up the last saved state, with the
same data, and on a CPU gives the same numbers bit for bit. What a phase computes is in the other modules;
here is only their order.
"""

import copy
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from ..hub import checkpoint_folder
from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.attention import SparseMixer
from ..model.flops import forward_flops, matmul_flops_per_second
from ..ops.backends import backend_everywhere
from ..runs import RunFolder, progress_bar, read_json, require_matplotlib, write_errors, write_json
from .align import Alignment
from .batches import Batches
from .calibrate import Calibration, calibrate
from .compute import autocast, choose_compute
from .config import ConvertConfig, Execution, Phase, RunIdentity
from .distill import Distillation, cache_step, cached_targets, live_targets
from .loop import Clock, PhaseLoop, Settings, Stopped
from .lora import merge_lora
from .outcome import load_outcome, save_outcome
from .plan import Planned, measure_alignment, measure_distillation, timed
from .probes import Prober, replaced
from .report import plot_alignment, plot_distillation, plot_importance, print_plan
from .retrieval import retrieval_scores
from .selection import Scores, default_keep, importance, select_layers
from .teacher import check_vocabulary, load_teacher, read_config, teacher_config
from .tokens import Sample
from .transfer import assemble, lightning_mixers, student_config

logger = logging.getLogger("opensala")
_REUSED = (
    "teacher",
    "align",
    "length",
    "lightning_nkv",
    "calibrate",
    "calibrate_tokens",
    "clip",
    "compute",
    "data",
    "tokens",
    "task_share",
    "seed",
    "dtype",
)  # what aligned mixers depend on
_TIMED_STEPS = 20  # a phase of fewer is not worth measuring the machine for


def convert(
    config: ConvertConfig,
    output: str | Path,
    *,
    resume: bool = False,
    plan_only: bool = False,
    quiet: bool = False,
    execution: Execution | None = None,
) -> Path:
    """Convert a teacher; returns the folder of the finished checkpoint, `output`/model, or `output` itself
    where the seconds of `execution` were over before.

    Args:
        config: what to do.
        output: folder of the run.
        resume: resume a run that was stopped.
        plan_only: print the plan and stop.
        quiet: no progress bars, no plan.
        execution: how this machine carries it out.

    Raises:
        ValueError: an unsupported teacher, data without a full sequence, a folder of another run or one that
            another process works in, a number of layers that cannot be kept, a loss that is not finite, or a
            disk that is full or cannot be written (the last saved state stays as it is).
    """
    execution = execution or Execution()
    execution.check()
    with write_errors(Path(output), "go on with --resume"), backend_everywhere(execution.backend):
        try:
            return Conversion(config, output, resume, quiet, execution).run(plan_only)
        except Stopped as stopped:
            print(
                f"stopped after {execution.seconds:g} s in {stopped}; the state is saved: go on with "
                "--resume",
                file=sys.stderr,
            )
            return Path(output)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no GPU here; use cpu")
    return device


def _tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(checkpoint_folder(path))
    except OSError as error:
        raise ValueError(
            f"teacher: {path} has no tokenizer that can be read ({error}); save one beside the model"
        ) from error


class Conversion:
    """A run in progress. See `convert`."""

    def __init__(
        self,
        config: ConvertConfig,
        output: str | Path,
        resume: bool,
        quiet: bool,
        execution: Execution | None = None,
    ) -> None:
        config.check()
        self.execution = execution or Execution()
        self.clock = Clock(self.execution.seconds)
        require_matplotlib()
        given = read_config(config.teacher)
        shape = teacher_config(given)
        self.config, self.quiet = config, quiet
        self.keep = self._number_kept(shape.num_hidden_layers)
        self._student_config(shape, list(range(self.keep)))  # refuses now what it would refuse after hours
        self.device = _device(config.device)
        self.tokenizer = _tokenizer(config.teacher)
        check_vocabulary(self.tokenizer, shape, f"teacher: {config.teacher}")
        self.batches = Batches(self.tokenizer, config)
        self.prober = Prober(self.batches, config.probes)
        self.texts = self.batches.fingerprint
        self._check_texts(Path(output))
        self.folder = RunFolder(output, RunIdentity(config, self.texts), resume)

    def _load(self) -> None:
        """The teacher and fresh mixers, once the folder is ours."""
        self.teacher = load_teacher(self.config.teacher, getattr(torch, self.config.dtype), self.device)
        self._fill_end_of_text()
        self.mixers = lightning_mixers(self.teacher, self.config.lightning_nkv)
        self.compute = self._chosen_compute()
        self._peak: float | None = None

    def _chosen_compute(self) -> str:
        """The precision of products: what the run began with, so that a resumed one has the same numbers."""
        file, shape = self.folder.path / "compute.json", self.teacher.config
        known = read_json(file)
        if known is None:
            known = choose_compute(
                self.config.compute, self.device, shape.hidden_size, shape.intermediate_size
            )
            if self.config.compute == "auto":
                write_json(file, known)
        return str(known)

    def _check_texts(self, run: Path) -> None:
        """Raise ValueError if a run began with other texts: its data order would be another one from here
        on."""
        known = read_json(run / "config.json")
        if known is not None and known.get("texts") != self.texts:
            cause = (
                "files were changed"
                if self.config.data
                else "packages or Python were installed, removed or updated"
            )
            raise ValueError(
                f"data: the texts are not those that {run} began with ({cause} since): bring them back, "
                "or begin a new run"
            )

    def _number_kept(self, layers: int) -> int:
        config = self.config
        if config.layers is not None:
            outside = [i for i in config.layers if not 0 <= i < layers]
            if outside or len(set(config.layers)) != len(config.layers):
                raise ValueError(
                    f"layers must be different numbers in 0..{layers - 1}, got {list(config.layers)}"
                )
            return len(config.layers)
        keep = default_keep(layers, config.fix_ends) if config.keep is None else config.keep
        select_layers(
            None, keep, layers=layers, fix_ends=config.fix_ends, rule="uniform"
        )  # refuses what cannot be kept
        return keep

    def _fill_end_of_text(self) -> None:
        """A teacher that names no end of text takes its tokenizer's."""
        if (
            read_config(self.config.teacher).get("eos_token_id") is None
            and self.tokenizer.eos_token_id is not None
        ):
            self.teacher.config.eos_token_id = self.tokenizer.eos_token_id

    def run(self, plan_only: bool = False) -> Path:
        with self.folder.held():
            finished = self._run(plan_only)
            if plan_only:
                self.folder.forget_unbegun()
            return finished

    def _run(self, plan_only: bool) -> Path:
        finished = self.folder.path / "model"
        if finished.exists():
            return finished
        self._load()
        if plan_only or not self.quiet:
            self.print_plan()
        if plan_only:
            return finished
        if self.config.reuse:
            self._reuse(Path(self.config.reuse))
        self.align()
        kept = self.choose()
        student = self.distill(kept)
        self.export(student, kept)
        return finished

    # --- the plan ---

    def print_plan(self) -> None:
        """Print what is to be done, with times and memory from a measured pass of each kind."""
        config, layers, rows = self.config, len(self.mixers), []
        state = self.folder.load_state("align")
        if not config.reuse and not _over(state):
            alignment = Alignment(self.teacher, self.mixers, config.align, self.compute, config.clip)
            sample, passes = self._pass("align")
            rows.append(measure_alignment(alignment, sample, passes, self._left("align", state)))
        if self._needs_scores() and not self._scored():
            probe = config.probes
            seconds = timed(lambda: self.prober.score_some(self.teacher), self.device)
            batches = -(-probe.sequences // probe.batch)
            passes = 1 if config.rule == "retrieval" else layers + 1
            rows.append(Planned("sweep", passes, 2 * probe.sequences * probe.length, seconds * batches, 0))
        for name, phase in list(config.phases().items())[1:]:
            state = self.folder.load_state(name)
            if not phase.steps or _over(state):
                continue
            kept = list(config.layers) if config.layers is not None else self._some_layers()
            distillation = self._distillation(self._student(kept), phase)
            self._prepare(distillation.student, phase)
            sample, passes = self._pass(name)
            rows.append(measure_distillation(name, distillation, sample, passes, self._left(name, state)))
            del distillation
        print_plan(rows, self.device)

    def _some_layers(self) -> list[int]:
        layers = len(self.mixers)
        return (
            select_layers(None, self.keep, layers=layers, fix_ends=False, rule="uniform") if self.keep else []
        )

    def _left(self, name: str, state: dict[str, Any] | None) -> int:
        return self.config.phases()[name].steps - (state["step"] if state else 0)

    def _pass(self, name: str) -> tuple[Sample, float]:
        """The sequences of one pass of a phase, and how many passes a step has."""
        phase = self.config.phases()[name]
        rows = self.execution.rows(phase.batch, self.config.length_of(name))
        return self.batches.train(name, 0, rows).to(self.device), phase.batch / rows

    def _batch(self, phase: str, step: int) -> Sample:
        return self.batches.train(phase, step, self.config.phases()[phase].batch)

    # --- alignment ---

    def align(self) -> None:
        """Calibrate and fit all mixers, from the last saved state on."""
        config, state = self.config, self.folder.load_state("align")
        if state is None:
            self._calibrate("calibration")
        alignment = Alignment(self.teacher, self.mixers, config.align, self.compute, config.clip)
        if config.align.steps:
            flops = forward_flops(self.teacher.config, config.length_of("align"), False)
            flops += 6 * sum(p.numel() for p in self.mixers.parameters())
            self._loop("align", self.mixers, flops).run(alignment)
        records = self.folder.metrics("align")
        if records:
            plot_alignment(records, self.folder.path / "plots" / "alignment.png")
        self.mixers.requires_grad_(False)
        self._calibrate_again()

    def _calibrate(self, name: str) -> Calibration:
        """Fit the mixers' output projections, and note what that did."""
        config = self.config
        length = config.length_of("align")
        rows = self.execution.rows(config.align.batch, length)
        inner = self.teacher.config.num_attention_heads * (self.teacher.config.head_dim or 0)
        tokens = max(config.calibrate_tokens, 8 * inner)  # fewer would fit the sample, not the layer
        count = max(2, -(-tokens // (rows * length)))
        first = config.align.steps + (0 if name == "calibration" else count)  # sequences of their own
        batches = (self.batches.train("align", first + n, rows).to(self.device).ids for n in range(count))
        found = calibrate(self.teacher, self.mixers, batches, config.calibrate, self.compute)
        write_json(self.folder.path / f"{name}.json", found._asdict())
        logger.info("%s: error %.3f -> %.3f", name, *(sum(x) / len(x) for x in found))
        return found

    def _calibrate_again(self) -> None:
        """Solve for the output projections once more behind the alignment; kept in its saved state."""
        state = self.folder.load_state("align")
        if self.config.calibrate != "ridge" or state is None or state.get("calibrated"):
            return
        self._calibrate("calibration_aligned")
        weights = {name: value.cpu() for name, value in self.mixers.state_dict().items()}
        self.folder.save_state("align", {**state, "weights": weights, "calibrated": True})

    def _loop(
        self,
        name: str,
        weights: nn.Module,
        flops: float,
        validate: Callable[[], dict[str, float]] | None = None,
        before: Callable[[int], None] | None = None,
    ) -> PhaseLoop:
        """The loop of a phase. `flops`: of a token, forwards and backwards."""
        config = self.config
        phase = config.phases()[name]
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
            self._peak or 0.0,
        )
        return PhaseLoop(
            self.folder,
            settings,
            self.execution,
            self.clock,
            lambda step: self._batch(name, step),
            weights,
            validate=validate,
            before=before,
            quiet=self.quiet,
        )

    def _reuse(self, other: Path) -> None:
        """Take aligned mixers and scores from another finished run, if they are what this one would have
        computed."""
        if (self.folder.path / "align.pt").exists():
            return
        known, mine = read_json(other / "config.json"), self.config.as_dict()
        if known is None or not (other / "align.pt").exists():
            raise ValueError(f"reuse: {other} holds no aligned run")
        different = [key for key in _REUSED if known[key] != mine[key]]
        if different:
            raise ValueError(f"reuse: {other} was aligned with another {', '.join(different)}")
        self._check_texts(other)
        state = torch.load(other / "align.pt", weights_only=True, map_location="cpu")
        steps = state["step"]
        if steps != self.config.align.steps and not state.get("done"):
            raise ValueError(
                f"reuse: {other} was aligned for {steps} of {self.config.align.steps} steps: resume it first"
            )
        for name in ("metrics.jsonl", "scores.json", "calibration.json", "calibration_aligned.json"):
            if (other / name).exists() and (name != "scores.json" or known["probes"] == mine["probes"]):
                shutil.copyfile(other / name, self.folder.path / name)
        for name in ("distill", "long"):
            self.folder.forget_after(name, 0)
        shutil.copyfile(other / "align.pt", self.folder.path / "align.partial")
        (self.folder.path / "align.partial").replace(self.folder.path / "align.pt")

    # --- selection ---

    def _scored(self) -> bool:
        """Whether the scores the rule needs are there, in this folder or in one from which they will be taken
        over."""
        for folder in (self.folder.path, *([Path(self.config.reuse)] if self.config.reuse else [])):
            known, scores = read_json(folder / "config.json"), read_json(folder / "scores.json")
            same = known is None or known["probes"] == self.config.as_dict()["probes"]
            needed = {"kl": "kl", "retrieval": "retrieval"}.get(self.config.rule, "general")
            if scores and same and needed in scores:
                return True
        return False

    def _needs_scores(self) -> bool:
        return self.config.layers is None and self.config.rule in ("halo", "recall", "kl", "retrieval")

    def choose(self) -> list[int]:
        """The kept layers: as told, or by the rule from the scores of the sweep."""
        config, layers = self.config, len(self.mixers)
        if config.layers is not None:
            kept = sorted(config.layers)
        else:
            scores = None
            if self._needs_scores():
                scores = self.watch_copying() if config.rule == "retrieval" else self.sweep()
            kept = select_layers(
                scores, self.keep, layers=layers, fix_ends=config.fix_ends, rule=config.rule, seed=config.seed
            )
            if scores is not None and config.rule in ("halo", "retrieval"):
                by_halo = config.rule == "halo"
                values = importance(scores.recall, scores.general) if by_halo else list(scores.retrieval)
                plot_importance(
                    values,
                    kept,
                    "lost recall / lost general ability" if by_halo else "attention to what is copied",
                    self.folder.path / "plots" / "importance.png",
                )
        write_json(
            self.folder.path / "selection.json",
            {
                "rule": "given" if config.layers is not None else config.rule,
                "fix_ends": config.fix_ends,
                "kept": kept,
            },
        )
        logger.info("kept layers: %s", kept)
        return kept

    def watch_copying(self) -> Scores:
        """Score each layer by what its heads do while the teacher copies: one pass over the probes."""
        file = self.folder.path / "scores.json"
        record = read_json(file) or {"layers": []}
        if "retrieval" not in record:
            with self._measuring():
                record["retrieval"] = retrieval_scores(self.teacher, *self.prober.facts)
            write_json(file, record)
        return Scores(retrieval=tuple(record["retrieval"]))

    def sweep(self) -> Scores:
        """Score the teacher, then the teacher with each layer replaced; saved after every layer."""
        file, layers = self.folder.path / "scores.json", len(self.mixers)
        record = read_json(file) or {"layers": []}
        with (
            torch.no_grad(),
            self._measuring(),
            progress_bar("sweep", layers + 1, quiet=self.quiet or len(record["layers"]) == layers) as bar,
        ):
            if "teacher" not in record:
                record["teacher"] = self.prober.score(self.teacher).as_dict()
            bar.advance()
            for i in range(layers):
                if i >= len(record["layers"]):
                    with replaced(self.teacher, {i: self._cast(i)}):
                        record["layers"].append(self.prober.score(self.teacher).as_dict())
                if self.config.rule == "kl" and "kl" not in record["layers"][i]:
                    others = {j: self._cast(j) for j in range(layers) if j != i}
                    record["layers"][i]["kl"] = self.prober.divergence(self.teacher, others)
                write_json(file, record)
                bar.advance(
                    f"layer {i}: recall {record['layers'][i]['recall']:.3f}, nll "
                    f"{record['layers'][i]['nll']:.3f}"
                )
        names = ("recall", "general", "kl") if self.config.rule == "kl" else ("recall", "general")
        lists = {name: [layer[name] for layer in record["layers"]] for name in names}
        write_json(file, record | lists)
        return Scores.from_dict(lists)

    def _cast(self, layer: int) -> nn.Module:
        """The mixer of a layer in the teacher's dtype."""
        mixer = self.mixers[layer]
        return mixer if self.teacher.dtype == torch.float32 else copy.deepcopy(mixer).to(self.teacher.dtype)

    # --- distillation ---

    def _student_config(self, teacher: MiniCPMSALAConfig, kept: list[int]) -> MiniCPMSALAConfig:
        config = self.config
        return student_config(
            teacher,
            kept,
            hype=config.hype,
            attn_qk_norm=config.attn_qk_norm,
            attn_scale_base=config.attn_scale_base,
            sparse_config=config.sparse_config,
            lightning_nkv=config.lightning_nkv,
        )

    def _student(self, kept: list[int]) -> MiniCPMSALAForCausalLM:
        built = self._student_config(self.teacher.config, kept)
        student = assemble(self.teacher, built, dict(enumerate(self.mixers)), torch.float32)
        student.set_attention_mode("dense")  # until a phase says otherwise; small teachers set dense_len low
        return student

    def _distillation(
        self, student: MiniCPMSALAForCausalLM, phase: Phase, cache: Path | None = None
    ) -> Distillation:
        config = self.config
        return Distillation(
            student,
            config.trainable,
            live_targets(self.teacher) if cache is None else cached_targets(cache),
            self.teacher.lm_head.weight,
            phase,
            compute=self.compute,
            most=config.clip,
            rank=config.lora_rank,
            seed=config.seed,
        )

    def _prepare(self, student: MiniCPMSALAForCausalLM, phase: Phase) -> None:
        """Set how the student attends and what its layers keep, for a phase."""
        student.set_attention_mode("auto" if phase.sparse else "dense")
        student.train()
        for layer in student.model.layers:
            layer.gradient_checkpointing = self.execution.recompute  # type: ignore[assignment]

    def distill(self, kept: list[int]) -> MiniCPMSALAForCausalLM:
        """The hybrid with these layers kept, distilled from the last saved state on; then the long phase."""
        config, student = self.config, self._student(kept)
        names = [name for name, phase in config.phases().items() if name != "align" and phase.steps]
        if not names:
            return student
        cache = self._cache() if config.cache_teacher and config.distill.steps else None
        distillation = self._distillation(student, config.distill, cache)
        trained = nn.ParameterList(distillation.parameters)
        if not any((self.folder.path / f"{name}.pt").exists() for name in names):
            self._measure_result("aligned", student)
        for name in names:
            phase = config.phases()[name]
            if name == "long":
                distillation.targets = live_targets(self.teacher)
                distillation.begin(phase)
            self._prepare(student, phase)
            loop = self._loop(
                name,
                trained,
                self._flops(student, config.length_of(name), phase.sparse),
                lambda: self._validated(student),
                (lambda step: self._fade(student, step)) if name == "distill" and config.hype_fade else None,
            )
            try:
                loop.run(distillation)
            except Stopped:  # on a machine that is lent there may be no other time
                self._save_outcome(student)
                raise
            self._fade(student, None)
        student.eval()
        plot_distillation(self.folder.metrics("distill"), self.folder.path / "plots" / "distillation.png")
        return student

    def _flops(self, student: MiniCPMSALAForCausalLM, length: int, sparse: bool) -> float:
        """Of a token: the teacher forwards, the student both ways, without gradients of what is frozen."""
        one = forward_flops(student.config, length, sparse)
        frozen = sum(p.numel() for p in student.parameters() if p.dim() == 2 and not p.requires_grad)
        return forward_flops(self.teacher.config, length, False) + 3 * one - 2 * frozen

    def _fade(self, student: MiniCPMSALAForCausalLM, step: int | None) -> None:
        """Rotary positions of the kept layers at a step of the distillation, while they fade out."""
        left = 0.0
        if step is not None and self.config.hype and self.config.hype_fade:
            tokens = step * self.config.distill.batch * self.config.length_of("distill")
            left = max(0.0, 1 - tokens / self.config.hype_fade)
        for module in student.modules():
            if isinstance(module, SparseMixer):
                module.rope_share = left or None

    def _validated(self, student: MiniCPMSALAForCausalLM) -> dict[str, float]:
        """Recall, likelihood and divergence of the student on held-out probes, in the midst of a phase."""
        with self._measuring():
            score, kl = self.prober.builtin(student), self.prober.kl(self.teacher, student)
        return {"recall": score.recall, "nll": score.nll, "kl": kl}

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Products as in training."""
        with autocast(self.compute, self.device):
            yield

    def _cache(self) -> Path:
        """Write the teacher's final states of every step that has none yet."""
        cache, steps = self.folder.path / "teacher_states", self.config.distill.steps
        cache.mkdir(exist_ok=True)
        with progress_bar("teacher", steps, quiet=self.quiet) as bar:
            for step in range(steps):
                with autocast(self.compute, self.device):
                    cache_step(self.teacher, cache, step, self._batch("distill", step).ids.to(self.device))
                bar.advance()
        return cache

    # --- the end ---

    def _measure_result(self, name: str, student: MiniCPMSALAForCausalLM) -> None:
        known = read_json(self.folder.path / "result.json") or {}
        with torch.no_grad(), self._measuring():
            if "teacher" not in known:
                known["teacher"] = self.prober.builtin(self.teacher).as_dict()
            known[name] = self.prober.builtin(student).as_dict()
        write_json(self.folder.path / "result.json", known)

    def _save_outcome(self, student: MiniCPMSALAForCausalLM) -> None:
        """What was trained so far, where that is less than everything."""
        if self.config.trainable == "all":
            return
        mode = student.config.attention_mode
        student.set_attention_mode("auto")
        partial, folder = self.folder.path / "outcome.partial", self.folder.path / "outcome"
        shutil.rmtree(partial, ignore_errors=True)
        save_outcome(self.teacher, student, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        student.set_attention_mode(mode)

    def export(self, student: MiniCPMSALAForCausalLM, kept: list[int]) -> None:
        """Measure the hybrid, and write it in the teacher's dtype, with tokenizer and generation settings."""
        distilled = self.config.distill.steps or (self.config.long is not None and self.config.long.steps)
        self._measure_result("distilled" if distilled else "aligned", student)
        student.set_attention_mode("auto")
        if distilled:
            self._save_outcome(student)
        merge_lora(student)
        student.requires_grad_(False).to(self.teacher.dtype)
        student.generation_config = self.teacher.generation_config
        partial = self.folder.path / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            student.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            partial.replace(self.folder.path / "model")
        except (OSError, SafetensorError):
            shutil.rmtree(partial, ignore_errors=True)  # a full disk is not kept full
            raise
        if not self.quiet:
            record = read_json(self.folder.path / "result.json")
            for name, score in record.items():
                print(
                    f"{name}: recall {score['recall']:.3f}, held-out nll {score['nll']:.4f}", file=sys.stderr
                )
            print(f"kept layers {kept}; saved {self.folder.path / 'model'}", file=sys.stderr)


def _over(state: dict[str, Any] | None) -> bool:
    """Whether a phase's saved state is its end."""
    return bool(state and state.get("done"))


def merge_outcome(teacher: str, outcome: str | Path, output: str | Path) -> Path:
    """Write the hybrid of a teacher and the outcome of its conversion as a checkpoint; returns its folder.

    Raises:
        ValueError: what `load_teacher` and `load_outcome` refuse, or a folder that is not empty.
    """
    target = Path(output)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: give a new folder")
    source, tokenizer = load_teacher(teacher), _tokenizer(teacher)
    with write_errors(target):
        student = load_outcome(source, outcome)
        student.generation_config = source.generation_config
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target
