"""The whole conversion as one run that can be stopped anywhere: alignment, sweep, choice of layers,
distillation, export.

Each phase saves its state every so many steps; a run that resumes takes up the last saved state, with the
same data, and on a CPU gives the same numbers bit for bit. What a phase computes is in the other modules;
here is only their order.
"""

import copy
import logging
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..runs import RunFolder, progress_bar, read_json, require_matplotlib, write_errors, write_json
from .align import Alignment
from .batches import Batches
from .config import ConvertConfig, RunIdentity
from .distill import Distillation, cache_step, cached_targets, live_targets
from .probes import Prober, replaced
from .report import (
    memory_bytes,
    plot_alignment,
    plot_distillation,
    plot_importance,
    print_plan,
)
from .selection import Scores, default_keep, importance, select_layers
from .teacher import check_vocabulary, load_teacher, read_config, teacher_config
from .transfer import assemble, lightning_mixers, student_config

logger = logging.getLogger("opensala")
_REUSED = (
    "teacher",
    "align",
    "length",
    "data",
    "task_share",
    "seed",
    "dtype",
)  # what aligned mixers depend on


def convert(
    config: ConvertConfig,
    output: str | Path,
    *,
    resume: bool = False,
    plan_only: bool = False,
    quiet: bool = False,
) -> Path:
    """Convert a teacher; returns the folder of the finished checkpoint, `output`/model.

    Args:
        config: what to do.
        output: folder of the run.
        resume: resume a run that was stopped.
        plan_only: print the plan and stop.
        quiet: no progress bars, no plan.

    Raises:
        ValueError: an unsupported teacher, data without a full sequence, a folder of another run or one that
            another process works in, a number of layers that cannot be kept, a loss that is not finite, or a
            disk that is full or cannot be written (the last saved state stays as it is).
    """
    with write_errors(Path(output), "go on with --resume"):
        return Conversion(config, output, resume, quiet).run(plan_only)


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
        return AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"teacher: {path} has no tokenizer that can be read ({error}); save one beside the model"
        ) from error


class Conversion:
    """A run in progress. See `convert`."""

    def __init__(self, config: ConvertConfig, output: str | Path, resume: bool, quiet: bool) -> None:
        config.check()
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
        self.mixers = lightning_mixers(self.teacher)

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
        """Print what is to be done, with times from one measured step of each kind."""
        config, layers = self.config, len(self.mixers)
        rows = []
        state = self.folder.load_state("align")
        left = 0 if config.reuse else config.align.steps - (state["step"] if state else 0)
        if left:
            alignment = Alignment(self.teacher, self.mixers, config.align)
            seconds = self._measure(lambda: alignment.gradients(self._batch("align", 0)), alignment.forget)
            rows.append(("alignment", left, config.align.batch * config.length, seconds))
        if self._needs_scores() and not self._scored():
            seconds = self._measure(lambda: self.prober.score(self.teacher), lambda: None)
            probe = config.probes
            rows.append(("sweep", layers + 1, 2 * probe.sequences * probe.length, seconds))
        state = self.folder.load_state("distill")
        left = config.distill.steps - (state["step"] if state else 0)
        if left:
            kept = (
                select_layers(None, self.keep, layers=layers, fix_ends=False, rule="uniform")
                if self.keep
                else []
            )
            distillation = self._distillation(self._student(kept))
            seconds = self._measure(
                lambda: distillation.gradients(0, self._batch("distill", 0)), distillation.forget
            )
            rows.append(("distillation", left, config.distill.batch * config.length, seconds))
        count = sum(p.numel() for p in self.mixers.parameters())
        print_plan(rows, memory_bytes(self.teacher, count, config), self.teacher.device)

    @staticmethod
    def _measure(step: Any, forget: Any) -> float:
        """Seconds of a second call: the first one compiles and allocates."""
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            forget()
        return seconds

    def _batch(self, phase: str, step: int) -> torch.Tensor:
        count = self.config.align.batch if phase == "align" else self.config.distill.batch
        return self.batches.train(phase, step, count).to(self.teacher.device)

    # --- alignment ---

    def align(self) -> None:
        """Fit all mixers, from the last saved state on."""
        config, alignment = self.config, Alignment(self.teacher, self.mixers, self.config.align)
        step = self._restore("align", self.mixers, alignment.optimizer)
        with progress_bar(
            "alignment", config.align.steps, step, self.quiet or step == config.align.steps
        ) as bar:
            while step < config.align.steps:
                errors = alignment.gradients(self._batch("align", step))
                self._check_finite(
                    "align", step, {f"the loss of layer {i}": value for i, value in enumerate(errors["loss"])}
                )
                norms = alignment.clip()
                self._check_finite(
                    "align", step, {f"the gradient of layer {i}": value for i, value in enumerate(norms)}
                )
                alignment.update(step)
                self.folder.log(
                    {
                        "phase": "align",
                        "step": step,
                        "lr": config.align.rate(step),
                        **errors,
                        "grad_norm": norms,
                    }
                )
                step += 1
                bar.advance(f"error {sum(errors['relative']) / len(norms):.3f}")
                self._save("align", step, config.align.steps, self.mixers, alignment.optimizer)
        records = self.folder.metrics("align")
        if records:
            plot_alignment(records, self.folder.path / "plots" / "alignment.png")
        self.mixers.requires_grad_(False)

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
        steps = torch.load(other / "align.pt", weights_only=True, map_location="cpu")["step"]
        if steps != self.config.align.steps:
            raise ValueError(
                f"reuse: {other} was aligned for {steps} of {self.config.align.steps} steps: resume it first"
            )
        for name in ("metrics.jsonl", "scores.json"):
            if (other / name).exists() and (name != "scores.json" or known["probes"] == mine["probes"]):
                shutil.copyfile(other / name, self.folder.path / name)
        self.folder.forget_after("distill", 0)
        shutil.copyfile(other / "align.pt", self.folder.path / "align.partial")
        (self.folder.path / "align.partial").replace(self.folder.path / "align.pt")

    # --- selection ---

    def _scored(self) -> bool:
        """Whether the scores the rule needs are there, in this folder or in one from which they will be taken
        over."""
        for folder in (self.folder.path, *([Path(self.config.reuse)] if self.config.reuse else [])):
            known, scores = read_json(folder / "config.json"), read_json(folder / "scores.json")
            same = known is None or known["probes"] == self.config.as_dict()["probes"]
            if scores and same and ("kl" in scores if self.config.rule == "kl" else "general" in scores):
                return True
        return False

    def _needs_scores(self) -> bool:
        return self.config.layers is None and self.config.rule in ("halo", "recall", "kl")

    def choose(self) -> list[int]:
        """The kept layers: as told, or by the rule from the scores of the sweep."""
        config, layers = self.config, len(self.mixers)
        if config.layers is not None:
            kept = sorted(config.layers)
        else:
            scores = self.sweep() if self._needs_scores() else None
            kept = select_layers(
                scores, self.keep, layers=layers, fix_ends=config.fix_ends, rule=config.rule, seed=config.seed
            )
            if scores is not None and config.rule == "halo":
                values = importance(scores.recall, scores.general)
                plot_importance(
                    values,
                    kept,
                    "lost recall / lost general ability",
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

    def sweep(self) -> Scores:
        """Score the teacher, then the teacher with each layer replaced; saved after every layer."""
        file, layers = self.folder.path / "scores.json", len(self.mixers)
        record = read_json(file) or {"layers": []}
        with (
            torch.no_grad(),
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
        )

    def _student(self, kept: list[int]) -> MiniCPMSALAForCausalLM:
        built = self._student_config(self.teacher.config, kept)
        student = assemble(self.teacher, built, dict(enumerate(self.mixers)), torch.float32)
        student.set_attention_mode(
            "dense"
        )  # training sequences are far below dense_len; small teachers set it low
        return student

    def _distillation(self, student: MiniCPMSALAForCausalLM, cache: Path | None = None) -> Distillation:
        targets = live_targets(self.teacher) if cache is None else cached_targets(cache)
        return Distillation(
            student, self.config.trainable, targets, self.teacher.lm_head.weight, self.config.distill
        )

    def distill(self, kept: list[int]) -> MiniCPMSALAForCausalLM:
        """The hybrid with these layers kept, distilled from the last saved state on."""
        config, student = self.config, self._student(kept)
        if not config.distill.steps:
            return student
        distillation = self._distillation(student, self._cache() if config.cache_teacher else None)
        trained = nn.ParameterList(distillation.parameters)
        step = self._restore("distill", trained, distillation.optimizer)
        if not step:
            self._measure_result("aligned", student)
        with progress_bar(
            "distillation", config.distill.steps, step, self.quiet or step == config.distill.steps
        ) as bar:
            while step < config.distill.steps:
                loss = distillation.gradients(step, self._batch("distill", step))
                self._check_finite("distill", step, {"the loss": loss})
                norm = distillation.clip()
                self._check_finite("distill", step, {"the gradient": norm})
                distillation.update(step)
                self.folder.log(
                    {
                        "phase": "distill",
                        "step": step,
                        "lr": config.distill.rate(step),
                        "loss": loss,
                        "grad_norm": norm,
                    }
                )
                step += 1
                bar.advance(f"KL {loss:.4f}")
                self._save("distill", step, config.distill.steps, trained, distillation.optimizer)
        plot_distillation(self.folder.metrics("distill"), self.folder.path / "plots" / "distillation.png")
        return student

    def _cache(self) -> Path:
        """Write the teacher's final states of every step that has none yet."""
        cache, steps = self.folder.path / "teacher_states", self.config.distill.steps
        cache.mkdir(exist_ok=True)
        with progress_bar("teacher", steps, quiet=self.quiet) as bar:
            for step in range(steps):
                cache_step(self.teacher, cache, step, self._batch("distill", step))
                bar.advance()
        return cache

    # --- the end ---

    def _measure_result(self, name: str, student: MiniCPMSALAForCausalLM) -> None:
        known = read_json(self.folder.path / "result.json") or {}
        probes = replace(self.config.probes, recall_tasks=(), general_tasks=())
        with torch.no_grad():
            if "teacher" not in known:
                known["teacher"] = Prober(self.batches, probes).score(self.teacher).as_dict()
            known[name] = Prober(self.batches, probes).score(student).as_dict()
        write_json(self.folder.path / "result.json", known)

    def export(self, student: MiniCPMSALAForCausalLM, kept: list[int]) -> None:
        """Measure the hybrid, and write it in the teacher's dtype, with tokenizer and generation settings."""
        self._measure_result("distilled" if self.config.distill.steps else "aligned", student)
        student.set_attention_mode("auto")
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

    # --- states ---

    def _restore(self, phase: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the last saved state of a phase; returns the next step."""
        state = self.folder.load_state(phase)
        step = 0
        if state is not None:
            module.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        self.folder.forget_after(phase, step)
        return step

    def _save(
        self, phase: str, step: int, steps: int, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        if step % self.config.save_every == 0 or step == steps:
            self.folder.save_state(
                phase, {"weights": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            )

    def _check_finite(self, phase: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                file, saved = (
                    self.folder.path / f"{phase}.pt",
                    step // self.config.save_every * self.config.save_every,
                )
                kept = (
                    f"the last good state, {file} (step {saved}), is kept"
                    if file.exists()
                    else "nothing was saved yet"
                )
                raise ValueError(
                    f"{phase} step {step}: {name} is {value}; {kept}. Try another run with a lower "
                    f"{phase}.lr, or look "
                    "for the cause in the data"
                )
