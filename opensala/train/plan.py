"""What a recipe costs: tokens, steps, FLOPs, memory a device and hours, stage by stage, beside training from
scratch."""

from dataclasses import dataclass

from rich.table import Table

from ..model import MiniCPMSALAConfig
from ..model.config import check_choice
from ..model.flops import forward_flops, training_flops
from .memory import training_memory
from .recipes import Halo, Recipe, Stage

GB = 10**9


@dataclass(frozen=True)
class Device:
    """`flops`: dense bfloat16 matrix FLOP/s as the vendor states them; `memory`: bytes."""

    flops: float
    memory: int


DEVICES = {
    "a100": Device(312e12, 80 * GB),
    "h100": Device(989e12, 80 * GB),
    "h200": Device(989e12, 141 * GB),
    "b200": Device(2250e12, 180 * GB),
}


@dataclass(frozen=True)
class Row:
    """A stage's cost. `memory` in bytes per device, `flops` in total."""

    name: str
    sequence: int
    tokens: int
    steps: int
    flops: float
    memory: int
    hours: float
    shape: str


def plan(recipe: Recipe, gpus: int, device: str, mfu: float) -> list[Row]:
    """One row for each stage.

    Args:
        mfu: share of the device's FLOP/s that the model's FLOPs (without recomputed ones) reach.

    Raises:
        ValueError: an unknown device, a share outside 0..1, or GPUs that do not divide by a stage's
            context-parallel ranks.
    """
    check_choice("device", device, tuple(DEVICES))
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, got {mfu}")
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    config = MiniCPMSALAConfig(**recipe.model)
    flops_per_second = gpus * DEVICES[device].flops * mfu
    rows = []
    for stage in recipe.stages:
        if isinstance(stage, Halo):
            rows.append(_halo(stage, config, DEVICES[device].flops * mfu))
            continue
        check_world(stage, gpus)
        tokens = stage.steps * stage.sequences * stage.sequence
        flops = tokens * training_flops(config, stage.sequence, stage.sparse)
        rows.append(
            Row(
                stage.name,
                stage.sequence,
                tokens,
                stage.steps,
                flops,
                training_memory(config, recipe, stage, gpus).total,
                flops / flops_per_second / 3600,
                f"{gpus // stage.cp} x {stage.cp}",
            )
        )
    return rows


def check_world(stage: Stage, ranks: int) -> None:
    """Raise ValueError if the ranks do not divide into groups that share a sequence."""
    if ranks % stage.cp:
        near = max(stage.cp, ranks // stage.cp * stage.cp)
        raise ValueError(
            f"{stage.name}: {ranks} processes do not divide into groups of {stage.name}.cp = {stage.cp}: "
            f"start {near}, or set {stage.name}.cp to a divisor of {ranks}"
        )


def _halo(stage: Halo, config: MiniCPMSALAConfig, flops_per_second: float) -> Row:
    """Alignment: a teacher's forward pass and the mixers' training; distillation: teacher and student. On one
    device."""
    align, distill, length = stage.config.align, stage.config.distill, stage.config.length
    forward = forward_flops(config, length, False)
    inner = config.num_attention_heads * (config.head_dim or 0)
    mixers = config.num_hidden_layers * 2 * 5 * config.hidden_size * inner  # five projections in every layer
    aligned, distilled = align.steps * align.batch * length, distill.steps * distill.batch * length
    flops = aligned * (forward + 3 * mixers) + distilled * (forward + 3 * forward)
    return Row(
        stage.name,
        length,
        distilled,
        align.steps + distill.steps,
        flops,
        0,
        flops / flops_per_second / 3600,
        "1 x 1",
    )


def scratch(recipe: Recipe, gpus: int, device: str, mfu: float, length: int = 4096) -> Row:
    """The same model on `scratch_tokens` tokens at `length`."""
    config = MiniCPMSALAConfig(**recipe.model)
    flops = recipe.scratch_tokens * training_flops(config, length, False)
    return Row(
        "from scratch",
        length,
        recipe.scratch_tokens,
        0,
        flops,
        0,
        flops / (gpus * DEVICES[device].flops * mfu) / 3600,
        "",
    )


def plan_table(recipe: Recipe, gpus: int, device: str, mfu: float) -> Table:
    """The plan as a table whose last lines are the total and training from scratch."""
    rows, whole = (
        plan(recipe, gpus, device, mfu),
        scratch(recipe, gpus, device, mfu) if recipe.scratch_tokens else None,
    )
    caption = (
        None
        if whole is None
        else (
            f"{sum(r.tokens for r in rows) / whole.tokens:.1%} of the tokens and "
            f"{sum(r.flops for r in rows) / whole.flops:.1%} of the FLOPs of training from scratch"
        )
    )
    table = Table(
        title=f"{recipe.name} on {gpus} {device}, {mfu:.0%} of {DEVICES[device].flops / 1e12:,.0f} TFLOP/s",
        box=None,
        pad_edge=False,
        caption=caption,
        caption_justify="left",
        title_justify="left",
    )
    for column in ("stage", "sequence", "tokens", "steps", "FLOPs", "GB a device", "data x context", "hours"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for r in rows:
        memory = f"{r.memory / GB:,.1f}" if r.memory else ""
        table.add_row(
            r.name,
            f"{r.sequence:,}",
            _short(r.tokens),
            f"{r.steps:,}",
            f"{r.flops:.2e}",
            memory,
            r.shape,
            f"{r.hours:,.1f}",
        )
    flops = sum(r.flops for r in rows)
    table.add_row(
        "total",
        "",
        _short(sum(r.tokens for r in rows)),
        f"{sum(r.steps for r in rows):,}",
        f"{flops:.2e}",
        "",
        "",
        f"{sum(r.hours for r in rows):,.1f}",
    )
    if whole is not None:
        table.add_row(
            whole.name,
            f"{whole.sequence:,}",
            _short(whole.tokens),
            "",
            f"{whole.flops:.2e}",
            "",
            "",
            f"{whole.hours:,.1f}",
        )
    return table


def _short(tokens: int) -> str:
    return f"{tokens / GB:,.1f}B" if tokens >= GB else f"{tokens / 1e6:,.2f}M"
