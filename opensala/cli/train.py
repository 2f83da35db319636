"""`opensala train`: the arguments of a training and of `opensala train plan`. Parsing only."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .group import RunUnlessNamed
from .options import Plan, Quiet, Resume

app = typer.Typer(
    cls=RunUnlessNamed,
    add_completion=False,
    rich_markup_mode=None,
    help="Train by a recipe (train RECIPE -o DIR), or say what it costs (train plan RECIPE).",
)

Recipe = Annotated[
    str,
    typer.Argument(
        help="minicpm_sala_9b (the published training), halo (HALO's, with its last stage), tiny (all its "
        "stages on two CPU cores), smollm2_135m (SmolLM2-135M on two CPU cores, in hours) or "
        "smollm2_135m_gpu."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change the recipe: FIELD=VALUE or STAGE.FIELD=VALUE, as stable.peak=1e-3; may be repeated.",
    ),
]


def _recipe(name: str, settings: list[str] | None, data: list[str] | None = None) -> Any:
    from ..train.overrides import bind, override
    from ..train.recipes import recipe_named

    recipe = recipe_named(name)
    for setting in settings or ():
        recipe = override(recipe, setting)
    paths = {}
    for given in data or ():
        source, equals, path = given.partition("=")
        if not equals or not path:
            raise ValueError(f"--data takes SOURCE=PATH, got {given!r}")
        paths[source] = path
    recipe = bind(recipe, paths)
    recipe.check()
    return recipe


@app.command()
def plan(
    recipe: Recipe,
    gpus: Annotated[int, typer.Option(help="How many.")] = 64,
    device: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h200",
    mfu: Annotated[
        float, typer.Option(help="Share of the device's matrix rate that the model's FLOPs reach.")
    ] = 0.4,
    teacher: Annotated[
        str, typer.Option(help="The Transformer to convert; only its config.json is read.")
    ] = "",
    settings: Set = None,
) -> None:
    """Tokens, FLOPs, memory a device, steps and hours of every stage, beside training from scratch."""
    from rich.console import Console

    from ..train.plan import plan_table

    Console(width=140).print(plan_table(_recipe(recipe, settings), gpus, device, mfu, teacher))


@app.command(hidden=True)
def run(
    recipe: Recipe,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of the run; the finished checkpoint goes to its model/."),
    ],
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Run this stage only; may be repeated. Those before it must be finished."),
    ] = None,
    resume: Resume = False,
    teacher: Annotated[
        str, typer.Option(help="Transformer to convert, instead of the recipe's own or one that it trains.")
    ] = "",
    init: Annotated[str, typer.Option(help="Hybrid checkpoint to go on with, instead of HALO.")] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="SOURCE=PATH: a file, folder or pattern for a source of the recipe; may be repeated."
        ),
    ] = None,
    skip_bad_data: Annotated[
        bool, typer.Option("--skip-bad-data", help="Count malformed documents and leave them out.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template (Jinja) for the chat stages.")
    ] = None,
    settings: Set = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
    plan_only: Plan = False,
    quiet: Quiet = False,
) -> None:
    """Train by a recipe, stage by stage. Under torchrun, on all its processes."""
    from ..train.pipeline import summary, train
    from ..train.start import Start
    from ..train.trainer import Stopped

    chosen = _recipe(recipe, settings, data)
    if plan_only:
        for item in chosen.stages:
            steps = (
                f"{item.steps:,} steps of {item.sequences:,} x {item.sequence:,} tokens"
                if hasattr(item, "sequences")
                else "conversion"
            )
            print(f"{item.name}: {steps}")
        return
    try:
        template = chat_template.read_text() if chat_template else ""
    except OSError as error:
        raise ValueError(f"--chat-template {chat_template} cannot be read: {error.strerror}") from error
    try:
        finished = train(
            chosen,
            output,
            start=Start(teacher, init),
            only=stage or (),
            resume=resume,
            device=device,
            skip_bad=skip_bad_data,
            chat_template=template,
            quiet=quiet,
        )
    except Stopped as stopped:
        print(f"opensala: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.signum) from None
    if int(os.environ.get("RANK", 0)) == 0:
        if not quiet:
            print(summary(output), file=sys.stderr)
        print(finished)
