"""What a recipe costs: tokens, steps, FLOPs, memory a device and hours, stage by stage, beside training from
scratch."""

from dataclasses import dataclass

from rich.table import Table

from ..convert.config import ConvertConfig, Execution
from ..convert.cost import conversion_parts, hours
from ..convert.opening import configured, number_kept
from ..convert.selection import select_layers
from ..convert.teacher import read_config, teacher_config
from ..model import MiniCPMSALAConfig
from ..model.config import SPARSE
from ..model.flops import training_flops
from ..model.machines import DEVICES, GB, check_machines
from .memory import training_memory
from .recipe import Halo, Recipe, Stage


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


def shape(recipe: Recipe, teacher: str = "") -> MiniCPMSALAConfig:
    """The hybrid's shape: the recipe's, or that of a teacher's `config.json`, with the layers kept that take
    most."""
    teacher = teacher or recipe.teacher
    if not teacher:
        return MiniCPMSALAConfig(**recipe.model)
    given = teacher_config(read_config(teacher))
    config = next((s.config for s in recipe.stages if isinstance(s, Halo)), ConvertConfig(teacher))
    keep = number_kept(config, given.num_hidden_layers)
    kept = select_layers(None, keep, layers=given.num_hidden_layers, fix_ends=config.fix_ends, rule="uniform")
    return configured(config, given, kept)


def plan(recipe: Recipe, gpus: int, device: str, mfu: float, teacher: str = "") -> list[Row]:
    """One row for each stage.

    Args:
        teacher: folder or hub name of the Transformer to convert, of which only the configuration is read.
        mfu: share of the device's FLOP/s that the model's FLOPs (without recomputed ones) reach.

    Raises:
        ValueError: an unknown device, a share outside 0..1, or GPUs that do not divide by a stage's
            context-parallel ranks.
    """
    flops_per_second = gpus * check_machines(gpus, device, mfu).flops * mfu
    config = shape(recipe, teacher)
    rows = []
    for stage in recipe.stages:
        if isinstance(stage, Halo):
            rows.append(_halo(stage, config, gpus, device, mfu))
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


def _halo(stage: Halo, shape: MiniCPMSALAConfig, gpus: int, device: str, mfu: float) -> Row:
    """All parts of the conversion; the memory is that of the hungriest."""
    execution = Execution(recompute=True) if gpus > 1 else Execution()
    parts = conversion_parts(_as_teacher(shape), stage.config, gpus, execution)
    return Row(
        stage.name,
        stage.config.length,
        sum(p.tokens for p in parts if p.name not in ("calibration", "sweep")),
        sum(p.steps for p in parts if p.name not in ("calibration", "sweep")),
        sum(p.flops for p in parts),
        max((p.memory for p in parts), default=0),
        sum(hours(p, gpus, device, mfu) for p in parts),
        f"{gpus} x 1",
    )


def _as_teacher(config: MiniCPMSALAConfig) -> MiniCPMSALAConfig:
    """The softmax Transformer that a hybrid of this shape is made from."""
    values = {k: v for k, v in config.to_dict().items() if k in MiniCPMSALAConfig.__annotations__}
    layers = {"mixer_types": [SPARSE] * config.num_hidden_layers, "attention_mode": "dense"}
    return MiniCPMSALAConfig(**values | layers | {"attn_use_rope": True, "attn_use_output_gate": False})


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


def plan_table(recipe: Recipe, gpus: int, device: str, mfu: float, teacher: str = "") -> Table:
    """The plan as a table whose last lines are the total and training from scratch."""
    rows, whole = (
        plan(recipe, gpus, device, mfu, teacher),
        scratch(recipe, gpus, device, mfu) if recipe.scratch_tokens and not teacher else None,
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
