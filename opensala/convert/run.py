"""The whole conversion as one run that can be stopped anywhere: alignment, sweep, choice of layers,
distillation, export.

Each phase saves its state every so many steps; a run that resumes takes up the last saved state, with the
same data, and on a CPU gives the same numbers bit for bit. What a phase computes is in the other modules;
here is only their order. It runs in one process, or in those that torchrun started: weights, gradients and
moments are sharded over them (`opensala.parallel`), sequences and probes are shared out (`ranks`), and a run
goes on with any number of them.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

from ..ops.backends import backend_everywhere
from ..parallel import ParallelConfig, close_parallel, init_parallel
from ..runs import write_errors
from .aligning import align
from .choosing import choose
from .config import ConvertConfig, Execution
from .continuing import continued
from .distilling import distill
from .export import export, merge_outcome
from .loop import Stopped
from .planning import print_measured_plan
from .ranks import Ranks
from .work import Work

__all__ = ["convert", "merge_outcome"]
_SECONDS = 3600.0  # after which a process that hears nothing of the others fails: one of them may be writing


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
    opened = not dist.is_initialized()
    try:
        with write_errors(Path(output), "go on with --resume"), backend_everywhere(execution.backend):
            work = Work(continued(config), output, resume, quiet, execution, _join(config))
            with work.folder.held() if work.folder is not None else nullcontext():
                return _run(work, plan_only)
    except Stopped as stopped:
        print(
            f"stopped after {execution.seconds:g} s in {stopped}; the state is saved: go on with --resume",
            file=sys.stderr,
        )
        return Path(output)
    finally:
        if opened:
            close_parallel()


def _join(config: ConvertConfig) -> Ranks:
    """The processes that were started together; this one alone if there are no others."""
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    kind = "cuda" if world > 1 and config.device.startswith("cuda") else "cpu"  # alone, gloo does for states
    return Ranks(init_parallel(ParallelConfig(), device=kind, timeout_s=_SECONDS))


def _run(work: Work, plan_only: bool) -> Path:
    finished = work.path / "model"
    if work.ranks.first(finished.exists):
        return finished
    work.load()
    if plan_only or not work.quiet:
        print_measured_plan(work)
    if plan_only:
        if work.folder is not None:
            work.folder.forget_unbegun()
        return finished
    if work.config.start is None:
        align(work)
    kept = choose(work)
    student = distill(work, kept)
    export(work, student, kept)
    return finished
