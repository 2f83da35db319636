"""Runs of the mini recipe in processes of their own, and where they are made to end."""

import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial

import torch

from opensala.convert.work import Work
from opensala.train.pipeline import train
from opensala.train.start import Start
from opensala.train.trainer import StageRun


def break_at(stage, step, action):
    """Call `action` when a run is about to take this step; returns the original method."""
    original = StageRun._take

    def take(self, batch):
        if (self.stage.name, self.step) == (stage, step):
            action()
        return original(self, batch)

    StageRun._take = take
    return original


def killed(recipe, folder, stage, step):
    """In a child: run until this step, then end by kill -9."""
    torch.set_num_threads(1)
    end = partial(os.kill, os.getpid(), signal.SIGKILL)
    if stage == "halo":
        original = Work.batch
        Work.batch = lambda self, phase, n: (
            end() if (phase, n) == ("distill", 2) else original(self, phase, n)
        )
    break_at(stage, step, end)
    train(recipe, folder, resume=(folder / "config.json").exists(), device="cpu", quiet=True)


def together(recipe, folder, init, cp):
    """In each process of a group: the stages after HALO, sequences of the stages `cp` names split over its
    ranks."""
    stages = tuple(replace(s, cp=cp.get(s.name, 1)) if hasattr(s, "cp") else s for s in recipe.stages)
    train(replace(recipe, stages=stages), folder, start=Start(init=str(init)), device="cpu", quiet=True)


def converted(recipe, folder, teacher):
    """In each process of a group: HALO alone, of this teacher."""
    halo = replace(recipe, stages=(recipe.stage("halo"),))
    train(halo, folder, start=Start(teacher=str(teacher)), device="cpu", quiet=True)


def in_child(function, *args):
    """Run in a process of its own; returns its exit code (-9 if it was killed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opensala.train.pipeline", "datasets"])
    child = context.Process(target=function, args=args)
    child.start()
    child.join(300)
    return child.exitcode
