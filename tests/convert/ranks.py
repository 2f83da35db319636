"""What the processes of a group do with a conversion; see test_ranks."""

import json
import os
import signal
from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opensala.convert import convert
from opensala.convert.align import Alignment
from opensala.convert.config import Execution
from opensala.convert.distill import Distillation
from opensala.convert.distilling import distillation_of
from opensala.convert.ranks import Ranks
from opensala.convert.work import Work
from opensala.parallel import ParallelConfig, init_parallel


def _join():
    """Here, so that all runs of a process are in one group, and so that one that waits in vain ends soon."""
    return Ranks(init_parallel(ParallelConfig(), device="cpu", timeout_s=150))


def whole(config, folder, execution=None, resume=False):
    """A run from its start or its last state to its end."""
    _join()
    convert(config, folder, quiet=True, resume=resume, execution=execution or Execution())


def several(config, folder, trainables):
    """A run for each set of what is trained; all take over the first one's mixers and scores."""
    for trainable in trainables:
        mine = replace(config, trainable=trainable, reuse=None if trainable == "all" else str(folder / "all"))
        whole(mine, folder / trainable)


def a_step_a_time(config, folder, resume):
    """Go on until the run's time, which is over behind the next step."""
    whole(config, folder, Execution(seconds=1e-6), resume)


def killed(config, folder, step):
    """Go on until this step of the distillation, then end by kill -9: the first rank does."""
    original = Distillation.step

    def stepped(self, n, sample, rows):
        if n == step and self.ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, n, sample, rows)

    Distillation.step = stepped
    whole(config, folder, resume=(folder / "config.json").exists())


def held(config, folder):
    """Bytes of weights, gradients and moments that a rank holds in each phase, left by the first one."""
    work = Work(config, folder, False, True, Execution(), _join())
    work.load()
    alignment = Alignment(work.teacher, work.mixers, config.align, work.compute, ranks=work.ranks)
    found = {"alignment": _bytes(alignment, work.batch("align", 0), [work.teacher, work.mixers])}
    student = work.student([0, 3])
    alignment.forget()
    distillation = distillation_of(work, student, config.distill)
    found["distillation"] = _bytes(distillation, work.batch("distill", 0), [work.teacher, student])
    if work.ranks.rank == 0:
        folder.with_name(f"{folder.name}.json").write_text(json.dumps(found))


def _bytes(trainee, sample, modules):
    trainee.step(0, sample, 1)
    trainee.optimizer.step()
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, FSDPModule):
            part.reshard()  # between passes
    parameters = [p for module in modules for p in module.parameters()]
    moments = [x for state in trainee.optimizer.state.values() for x in state.values() if x.dim()]
    every = [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments]
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in every)


def refused(config, folder):
    """What several processes refuse: the message, on every rank."""
    _join()
    try:
        convert(config, folder, quiet=True)
    except ValueError as error:
        torch.save(str(error), folder.with_name(f"{folder.name} {os.environ['RANK']}.pt"))
