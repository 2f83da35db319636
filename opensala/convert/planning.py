"""The plan of a run on this machine: what is left of it, in time and memory, from a measured pass of each
kind. Of a machine that is not there, `cost` tells."""

from pathlib import Path
from typing import Any

from ..runs import read_json
from .align import Alignment
from .aligning import ALIGNED
from .choosing import MEASURED
from .distilling import distillation_of, prepare
from .plan import Planned, measure_alignment, measure_distillation, timed
from .report import print_plan
from .selection import select_layers
from .sweep import PASSES
from .tokens import Sample
from .work import Work


def print_measured_plan(work: Work) -> None:
    """Print what is to be done, with times and memory from a measured pass of each kind; the first rank
    prints, all of them measure."""
    config, layers, rows = work.config, len(work.mixers), []
    note = work.files.note("align")
    if not config.reuse and not _over(note) and work.files.note(ALIGNED) is None:
        alignment = Alignment(work.teacher, work.mixers, config.align, work.compute, config.clip, work.ranks)
        sample, passes = _pass(work, "align")
        rows.append(measure_alignment(alignment, sample, passes, _left(work, "align", note)))
    if config.layers is None and config.rule in MEASURED and not _scored(work):
        rows.append(_sweep(work, layers))
    for name, phase in list(config.phases().items())[1:]:
        note = work.files.note(name)
        if not phase.steps or _over(note):
            continue
        kept = list(config.layers) if config.layers is not None else _some_layers(work)
        distillation = distillation_of(work, work.student(kept), phase)
        prepare(work, distillation.student, phase)
        sample, passes = _pass(work, name)
        rows.append(measure_distillation(name, distillation, sample, passes, _left(work, name, note)))
        del distillation
    if work.ranks.rank == 0:
        print_plan(rows, work.device)


def _sweep(work: Work, layers: int) -> Planned:
    probe = work.config.probes
    seconds = timed(lambda: work.prober.score_some(work.teacher), work.device)
    batches = -(-probe.sequences // (probe.batch * work.ranks.world))
    every = PASSES * layers + 2  # what it costs to measure the teacher itself
    passes = 1.0 if work.config.rule == "retrieval" else every / layers
    steps = 1 if work.config.rule == "retrieval" else layers
    tokens = round(2 * probe.sequences * probe.length * passes)
    return Planned("sweep", steps, tokens, seconds * batches * passes, 0)


def _some_layers(work: Work) -> list[int]:
    layers = len(work.mixers)
    return select_layers(None, work.keep, layers=layers, fix_ends=False, rule="uniform") if work.keep else []


def _over(note: dict[str, Any] | None) -> bool:
    """Whether a phase's saved state is its end."""
    return bool(note and note.get("done"))


def _left(work: Work, name: str, note: dict[str, Any] | None) -> int:
    return work.config.phases()[name].steps - (note["step"] if note else 0)


def _pass(work: Work, name: str) -> tuple[Sample, float]:
    """The sequences of one pass of a phase on this rank, and how many passes a step has."""
    phase, world = work.config.phases()[name], work.ranks.world
    share = -(-phase.batch // world)
    rows = work.execution.rows(share, work.config.length_of(name))
    return work.batches.train(name, 0, rows).to(work.device), share / rows


def _scored(work: Work) -> bool:
    """Whether the scores the rule needs are there, in this folder or in one from which they will be taken
    over."""
    config = work.config
    for folder in (work.path, *([Path(config.reuse)] if config.reuse else [])):
        known, scores = read_json(folder / "config.json"), read_json(folder / "scores.json")
        same = known is None or known["probes"] == config.as_dict()["probes"]
        if scores and same and ("retrieval" if config.rule == "retrieval" else "rope") in scores:
            return True
    return False
