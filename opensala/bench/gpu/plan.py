"""Which steps there are, in which order, and the process that runs them."""

import argparse
import time
from pathlib import Path

import torch

from . import ahead, ceilings, dense, kernels, model, tests, tools
from .device import Device, Rehearsal
from .sizes import AHEAD, TINY, Sizes
from .steps import GROUPS, OPTIONAL, Context, Live, Step, group_ends, run_steps

SIZES = {"released": Sizes(), "tiny": TINY, "ahead": AHEAD}


def groups_of(only: str) -> list[str]:
    """The groups of a list by commas, in the order of the run; the usual ones if it is empty.

    Raises:
        ValueError: an unknown group.
    """
    known = [*GROUPS, *OPTIONAL]
    named = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"--only takes {', '.join(known)}, got {unknown[0]!r}")
    return [g for g in known if g in named] if named else list(GROUPS)


def all_steps(sizes: Sizes) -> list[Step]:
    """Every step there is, in order."""
    found = ceilings.steps()
    rest = [
        ahead.begin(),
        *tests.steps(),
        ahead.end(),
        *kernels.steps(sizes),
        *ceilings.checks(),
        *model.steps(sizes.prompts, sizes.long_prompt),
        *dense.steps(sizes.prompts),
        *tests.large_steps(),
        *tools.steps(),
    ]
    order = [*GROUPS, *OPTIONAL]
    return sorted([*found, *rest], key=lambda step: order.index(step.group))


def run(options: argparse.Namespace) -> bool:
    """Run the steps of the groups asked for that no process before this one has begun.

    Returns:
        False if another process has to go on.
    """
    device = Rehearsal() if options.rehearse else Device()
    sizes = TINY if options.rehearse else SIZES[options.sizes]
    groups = groups_of(options.only)
    folder = Path(options.folder)
    report = Live(device, folder / f"{options.stem}.jsonl", options.rows)
    report.write({"event": "process", "machine": report.machine, "device": device.properties()})
    torch.manual_seed(0)
    context = Context(device, report, sizes, folder, options.stem)
    steps = [step for step in all_steps(sizes) if step.group in groups]
    return run_steps(steps, context, group_ends(groups, options.start, options.seconds))


def run_here(groups: list[str], rows: Path) -> Live:
    """Run groups in this process, without a limit of time; files go beside the rows."""
    device, folder = Device(), rows.parent / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"gpu_{time.strftime('%Y-%m-%d_%H%M%S')}"
    report = Live(device, folder / f"{stem}.jsonl", rows)
    report.write({"event": "process", "machine": report.machine, "device": device.properties()})
    context = Context(device, report, Sizes(), folder, stem)
    steps = [step for step in all_steps(Sizes()) if step.group in groups]
    run_steps(steps, context, dict.fromkeys(groups, float("inf")))
    return report
