"""The last phases of a run: the hybrid distilled, then on long sequences."""

import shutil
from pathlib import Path

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import SparseMixer
from ..model.flops import forward_flops
from ..runs import progress_bar
from .config import Phase
from .distill import Distillation, cache_step, cached_targets, live_targets
from .loop import Stopped
from .outcome import save_outcome
from .report import plot_distillation, print_cache
from .work import Work


def distill(work: Work, kept: list[int]) -> MiniCPMSALAForCausalLM:
    """The hybrid with these layers kept, distilled from the last saved state on; sharded like the teacher."""
    config, student = work.config, work.student(kept)
    names = [name for name, phase in config.phases().items() if name != "align" and phase.steps]
    if not names:
        return work.ranks.shard(student, work.compute)
    cache = _cached(work) if config.cache_teacher and config.distill.steps else None
    distillation = distillation_of(work, student, config.distill, cache)
    if all(work.files.note(name) is None for name in names):
        measure_result(work, "aligned" if config.start is None else "before", student)
    for name in names:
        phase = config.phases()[name]
        if name == "long":
            distillation.targets = live_targets(work.teacher)
            distillation.begin(phase)
        prepare(work, student, phase)
        fades = name == "distill" and config.hype_fade
        loop = work.loop(
            name,
            student,
            _flops(work, student, name),
            lambda: validated(work, student),
            (lambda step: fade(work, student, step)) if fades else None,
        )
        try:
            loop.run(distillation)
        except Stopped:  # on a machine that is lent there may be no other time
            write_outcome(work, student)
            raise
        fade(work, student, None)
    student.eval()
    records = work.files.metrics("distill")
    if records:
        plot_distillation(records, work.path / "plots" / "distillation.png")
    return student


def distillation_of(
    work: Work, student: MiniCPMSALAForCausalLM, phase: Phase, cache: Path | None = None
) -> Distillation:
    """What trains a student, which is sharded by it."""
    config = work.config
    return Distillation(
        student,
        config.trainable,
        live_targets(work.teacher) if cache is None else cached_targets(cache),
        work.teacher.lm_head.weight,
        phase,
        compute=work.compute,
        most=config.clip,
        rank=config.lora_rank,
        seed=config.seed,
        start=config.start,
        ranks=work.ranks,
    )


def prepare(work: Work, student: MiniCPMSALAForCausalLM, phase: Phase) -> None:
    """Set how the student attends and what its layers keep, for a phase."""
    student.set_attention_mode("auto" if phase.sparse else "dense")
    student.train()
    for layer in student.model.layers:
        layer.gradient_checkpointing = work.execution.recompute  # type: ignore[assignment]


def _flops(work: Work, student: MiniCPMSALAForCausalLM, name: str) -> float:
    """Of a token: the teacher forwards, the student both ways, without gradients of what is frozen."""
    length, sparse = work.config.length_of(name), work.config.phases()[name].sparse
    one = forward_flops(student.config, length, sparse)
    frozen = sum(p.numel() for p in student.parameters() if p.dim() == 2 and not p.requires_grad)
    return forward_flops(work.teacher.config, length, False) + 3 * one - 2 * frozen


def fade(work: Work, student: MiniCPMSALAForCausalLM, step: int | None) -> None:
    """Rotary positions of the kept layers at a step of the distillation, while they fade out."""
    config, left = work.config, 0.0
    if step is not None and config.hype and config.hype_fade:
        tokens = step * config.distill.batch * config.length_of("distill")
        left = max(0.0, 1 - tokens / config.hype_fade)
    for module in student.modules():
        if isinstance(module, SparseMixer):
            module.rope_share = left or None


def validated(work: Work, student: MiniCPMSALAForCausalLM) -> dict[str, float]:
    """Recall, likelihood and divergence of the student on held-out probes, in the midst of a phase."""
    with work.measuring():
        score, kl = work.prober.builtin(student), work.prober.kl(work.teacher, student)
    return {"recall": score.recall, "nll": score.nll, "kl": kl}


def _cached(work: Work) -> Path:
    """Write the teacher's final states of every step that has none yet."""
    cache, steps = work.path / "teacher_states", work.config.distill.steps
    work.files.do(lambda: cache.mkdir(exist_ok=True))
    if not work.quiet:
        print_cache(work.config, work.teacher, cache)
    with progress_bar("teacher", steps, quiet=work.quiet) as bar:
        for step in range(steps):
            ids = work.batch("distill", step).ids.to(work.device)
            with work.measuring():
                cache_step(work.teacher, cache, step, ids, work.ranks)
            bar.advance()
    return cache


def measure_result(work: Work, name: str, student: MiniCPMSALAForCausalLM) -> None:
    """Note how good a model is on the probes, beside the teacher."""
    known = work.files.read("result.json") or {}
    with work.measuring():
        if "teacher" not in known:
            known["teacher"] = work.prober.builtin(work.teacher).as_dict()
        known[name] = work.prober.builtin(student).as_dict()
    work.files.write("result.json", known)


def write_outcome(work: Work, student: MiniCPMSALAForCausalLM) -> None:
    """What was trained so far, where that is less than everything."""
    if work.config.trainable == "all":
        return
    mode = student.config.attention_mode
    student.set_attention_mode("auto")
    partial, folder = work.path / "outcome.partial", work.path / "outcome"
    work.files.do(lambda: shutil.rmtree(partial, ignore_errors=True))
    save_outcome(work.teacher, student, partial, ranks=work.ranks)

    def finish() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    work.files.do(finish)
    student.set_attention_mode(mode)
