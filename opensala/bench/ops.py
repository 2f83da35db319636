"""`opensala bench ops`: the ops against their baselines, after their results were checked; targets of speed.

Targets are ratios within one run (docs/speed.md says where they come from); absolute times mean little on a
shared machine. Each op has rows in float32 and in bfloat16; the targets are those of float32.
"""

from pathlib import Path

import torch

from ..engine import load_engine
from ..ops import BlockSpec
from ..ops.backends import Backend, planned_backend
from . import counts
from .cases import (
    Shape,
    time_decode,
    time_fused,
    time_lightning,
    time_other_forms,
    time_searches,
    time_sparse,
)
from .million import TOKENS, time_million
from .prefill import time_first_token, time_steps, time_twin_first_token
from .record import Report, Target
from .roofline import measure_roofline
from .twin import build_dense, twin_config
from .verify import TOLERANCE, verify_ops

SMALL = BlockSpec(window_size=512, topk=16)  # 24 blocks of 64, as the shipped model
K = 1024
CPU_DTYPES = (torch.float32, torch.bfloat16)  # the targets are of the first


def run(
    quick: bool = False,
    device: str = "auto",
    rows: Path = Path("benchmarks/results.csv"),
    million: bool = False,
    unit: int = K,
) -> Report:
    """Check, time, append the rows to a CSV file, print the targets; the last line on stdout is JSON.

    Args:
        quick: 16K tokens, no whole models (a minute on two cores); on a GPU, no whole model.
        device: `auto`, `cpu` or `cuda`.
        rows: CSV file that gets the rows.
        million: also a million tokens through every op and the shipped model (CPU).
        unit: how many tokens what is called K has, on a CPU; fewer than 1,024 only show that all of it runs.

    Raises:
        ValueError: an op that differs from its reference implementation, a device that is not there, a file
            of other columns; on a GPU, steps that failed (the others were run).
    """
    gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpu):
        raise ValueError(
            f"--device must be auto, cpu or cuda (and there is {'a' if gpu else 'no'} CUDA GPU here), got "
            f"{device!r}"
        )
    chosen = torch.device("cuda" if gpu and device != "cpu" else "cpu")
    if (million or unit != K) and chosen.type != "cpu":
        raise ValueError(f"--{'million' if million else 'unit'} measures the CPU: add --device cpu")
    if unit < 8:
        raise ValueError(f"--unit must be at least 8 tokens, got {unit}")
    if chosen.type == "cuda":
        return _cuda(quick, rows)
    report = Report(chosen)
    report.say(" | ".join(f"{name} {value}" for name, value in report.machine.items() if value))
    if unit != K:
        report.note(f"K stands for {unit} tokens: these figures say nothing about speed")
    _cpu(report, quick, unit)
    if million:
        _million(report, TOKENS // K * unit)
    report.append_to(rows)
    report.show_targets()
    print(report.as_json())
    return report


def _verified(report: Report, dtypes: tuple[torch.dtype, ...], shorten: int) -> Backend:
    best = planned_backend(torch.empty(0, dtype=dtypes[0], device=report.device))
    if best == "torch":
        report.note("the fastest form cannot run here: only the PyTorch form is timed (the log says why)")
    backends = tuple(dict.fromkeys((best, "torch")))
    for dtype in dtypes:
        report.say(
            f"results in {str(dtype).removeprefix('torch.')} against float64, {TOLERANCE[dtype]:.0e} at most"
        )
        for line in verify_ops(report.device, dtype, backends, shorten):  # type: ignore[arg-type]
            report.say(f"  {line}")
    return best  # type: ignore[return-value]


def _cpu(report: Report, quick: bool, unit: int = K) -> None:
    best = _verified(report, CPU_DTYPES, 1 if unit == K else 4)
    roofline = measure_roofline(report, quick or unit != K)
    for dtype in CPU_DTYPES:
        _time_ops(report, quick, unit, best, dtype)
    if quick:
        return
    part = time_sparse(
        report, Shape(128 * unit, 8, 1, 64, torch.float32), best, 0.0, backward=False, dense_most=1
    )
    report.targets.append(
        Target.at_least(
            "selection + sparse attention over dense attention, 96 blocks, 128K tokens", part.speedup, 5
        )
    )
    time_searches(report, Shape(256 * unit, 2, 1, 64, torch.float32, SMALL), 0.0)
    _shipped_model(report, roofline["float32"], unit)


def _time_ops(report: Report, quick: bool, unit: int, best: Backend, dtype: torch.dtype) -> None:
    """Rows of every op in one dtype; targets if it is that of the targets."""
    report.say(f"{str(dtype).removeprefix('torch.')} tensors")
    first, before = dtype == CPU_DTYPES[0], len(report.targets)
    length = 16 if quick else 64  # K tokens
    shape = Shape(length * unit, 8, 1, 64, dtype, SMALL)
    _lightning(report, shape, best, 512, 0.5, "five projections", 1.0 if quick else 4.0, f"{length}K tokens")
    part = time_sparse(
        report, shape, best, 1.0 if quick else 6.0, backward=True, dense_most=3 if quick else 1
    )
    _backward_target(report, f"sparse attention, {length}K tokens", part.backward, part.attend)
    if not quick:
        report.targets.append(
            Target.at_least(
                "selection + sparse attention over dense attention, 24 blocks, 64K tokens", part.speedup, 8
            )
        )
    slower: list[Backend] = ["torch", "naive"] if first else ["torch"]
    time_other_forms(report, Shape((4 if quick else 16) * unit, 8, 1, 64, dtype, SMALL), slower, 1.0)
    time_fused(report, shape, best, 0.5)
    time_decode(report, shape, best, (4 * unit, 256 * unit), 0.5 if quick else 2.0)
    if not first:
        del report.targets[before:]


def _lightning(
    report: Report,
    shape: Shape,
    best: Backend,
    hidden: int,
    limit: float,
    beside: str,
    budget: float,
    at: str,
) -> None:
    """Rows and targets of Lightning attention; `at` names the length."""
    forward, projections, backward = time_lightning(report, shape, best, hidden, budget)
    report.targets.append(
        Target.at_most(f"lightning forward over {beside}, {at}", forward / projections, limit)
    )
    _backward_target(report, f"lightning, {at}", backward, forward)


def _backward_target(report: Report, what: str, backward: float | None, forward: float) -> None:
    assert backward is not None, "it was asked for"
    report.targets.append(Target.at_most(f"backward over forward, {what}", backward / forward, 3))


def _shipped_model(report: Report, roofline: float, unit: int) -> None:
    report.say("the shipped model, and its full-attention twin")
    engine = load_engine(device="cpu")
    _, short = time_first_token(report, "shipped model", engine.model, 4 * unit, 2, keep=True)
    middle, _ = time_first_token(report, "shipped model", engine.model, 64 * unit, 3)
    long, cache = time_first_token(report, "shipped model", engine.model, 256 * unit, 1, keep=True)
    assert short is not None and cache is not None, "they were kept"
    steps = time_steps(report, "shipped model", engine.model, {4 * unit: short, 256 * unit: cache})
    del short, cache
    twin = time_twin_first_token(
        report, "full-attention twin", build_dense(twin_config(engine.config)), 64 * unit
    )
    achieved = counts.prefill_flops(engine.config, 64 * unit) / middle.p50
    report.targets += [
        Target.at_most(
            "decoding step at 256K over 4K, shipped model", steps[256 * unit] / steps[4 * unit], 1.4
        ),
        Target.at_least(
            "prefill of 64K, share of the fp32 matrix rate, shipped model", achieved / roofline, 0.5
        ),
        Target.at_least("first token at 64K, full-attention twin over shipped model", twin / middle.p50, 8),
        Target.at_most("first token at 256K over 64K, shipped model", long.p50 / middle.p50, 6),
    ]


def _million(report: Report, tokens: int) -> None:
    results = time_million(report, tokens)
    ops = [result["peak"] for op, result in results.items() if not op.startswith("shipped model")]
    report.targets.append(
        Target.at_most("1M tokens through each op, GB of memory at most", max(ops) / 1e9, 4)
    )
    bounds = {"shipped model": 4, "shipped model, bfloat16": 1.5, "shipped model, int8": 1.5}
    for model, most in bounds.items():
        found = results[model]
        report.targets += [
            Target.at_most(f"{model} reads 1M tokens, seconds", found["seconds"], 166),
            Target.at_most(f"{model} reads 1M tokens, GB of memory", found["peak"] / 1e9, most),
        ]


def _cuda(quick: bool, rows: Path) -> Report:
    """The steps of `make gpu` but the tests, in this process and without a limit of time."""
    from .gpu.outcome import result_of
    from .gpu.plan import run_here
    from .gpu.sizes import Sizes
    from .gpu.steps import read_events

    report = run_here(["ceilings", "kernels", *([] if quick else ["model", "million"])], rows)
    result = result_of(read_events(report.events), Sizes())
    report.targets = [Target(**t) for t in result["targets"]]
    report.show_targets()
    print(report.as_json())
    if result["failed"]:
        step, error = result["failed"][0]
        raise ValueError(f"{len(result['failed'])} steps failed, the first one was {step}: {error}")
    return report
