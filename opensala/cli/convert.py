"""`opensala convert`: the arguments of a conversion and of `opensala convert select`. Parsing only."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .convert_options import (
    AlignOptions,
    DistillOptions,
    LayerOptions,
    LongOptions,
    MachineOptions,
    TextOptions,
    TrainedOptions,
    amount,
    changed,
    phase_changes,
)
from .group import RunUnlessNamed
from .options import Plan, Quiet, Resume, with_options

app = typer.Typer(
    cls=RunUnlessNamed,
    add_completion=False,
    rich_markup_mode=None,
    help="Convert a Transformer into the hybrid (convert TEACHER -o DIR), or choose layers from scores "
    "(convert select).",
)

Seed = Annotated[int, typer.Option(help="Seed of data order and of the rule random.")]
FixEnds = Annotated[bool, typer.Option(help="Keep the first and the last layer whatever their scores.")]
Rule = Annotated[str, typer.Option(help="halo, recall, kl, retrieval, uniform, first-last-heavy or random.")]


@app.command()
def select(
    scores: Annotated[
        Path,
        typer.Argument(help='JSON file: {"recall": [...], "general": [...]}, one number per layer each.'),
    ],
    keep: Annotated[int, typer.Option(help="How many layers stay softmax attention, ends included.")],
    fix_ends: FixEnds = True,
    rule: Rule = "halo",
    seed: Seed = 0,
) -> None:
    """Choose the layers that stay softmax attention from scores; prints them as a JSON list."""
    from ..convert.selection import Scores, select_layers

    try:
        record = json.loads(scores.read_text())
    except OSError as error:
        raise ValueError(f"{scores} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{scores} is not JSON: {error}") from error
    if isinstance(record, dict) and "layers" in record:  # as the sweep of a run writes it
        record = {name: record[name] for name in ("recall", "general", "kl") if name in record}
    print(json.dumps(select_layers(Scores.from_dict(record), keep, fix_ends=fix_ends, rule=rule, seed=seed)))


@app.command()
def merge(
    teacher: Annotated[str, typer.Argument(help="Folder or hub name of the teacher.")],
    outcome: Annotated[Path, typer.Argument(help="The outcome folder of a conversion of this teacher.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
) -> None:
    """Make the hybrid of a teacher and what a conversion changed; prints the folder."""
    from ..convert.run import merge_outcome

    print(merge_outcome(teacher, outcome, output))


@app.command()
def pack(
    tokenizer: Annotated[
        str, typer.Argument(help="Whose tokenizer: a checkpoint's folder or hub name, or a pulled model.")
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Files, folders or patterns of JSONL, Parquet or text, each with a share or none: "
            "web=0.7 books.jsonl=0.3.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the packed tokens.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="To train on at most. Default: all there are.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of documents.")] = 0,
    skip_bad_data: Annotated[
        bool, typer.Option("--skip-bad-data", help="Count malformed documents and leave them out.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Tokenize documents once, streamed, into arrays to train on and held out; prints counts as JSON."""
    from transformers import AutoTokenizer

    from ..data.pack import pack as run
    from ..data.pack import parse_sources
    from ..hub import checkpoint_folder
    from ..runs.progress import counter

    sources, folder = parse_sources(data), checkpoint_folder(tokenizer)
    try:
        loaded = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{tokenizer}: there is no tokenizer that can be read ({error})") from error
    with counter("tokens", quiet) as advance:
        made = run(sources, loaded, output, tokens=tokens, seed=seed, skip_bad=skip_bad_data, advance=advance)
    print(json.dumps({key: made.record[key] for key in ("tokens", "held_out", "repeated", "skipped")}))


@app.command()
def plan(
    teacher: Annotated[
        str, typer.Argument(help="Folder or hub name of the Transformer; only its config.json is read.")
    ],
    recipe: Annotated[str, typer.Option(help="sala, halo, tiny, tiny-halo or smollm2_135m.")] = "sala",
    gpus: Annotated[int, typer.Option(help="How many.")] = 8,
    device: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    mfu: Annotated[
        float, typer.Option(help="Share of the device's matrix rate that the model's FLOPs reach.")
    ] = 0.4,
    dtype: Annotated[str, typer.Option(help="Of the teacher: float32, bfloat16 or float16.")] = "bfloat16",
    micro_tokens: Annotated[str | None, typer.Option(help="Tokens of one pass; default 4096.")] = None,
    recompute: Annotated[
        bool, typer.Option(help="Compute layers again in the backward pass instead of keeping them.")
    ] = True,
) -> None:
    """Tokens, FLOPs, hours and memory of a rank for a conversion on GPUs that are not here."""
    from rich.console import Console

    from ..convert.config import RECIPES, Execution
    from ..convert.cost import conversion_parts
    from ..convert.report import cost_table
    from ..convert.teacher import read_config, teacher_config
    from ..model.config import check_choice

    check_choice("recipe", recipe, tuple(RECIPES))
    config = replace(RECIPES[recipe](teacher), dtype=dtype, device="cuda", compute="bfloat16")
    config.check()
    passes = changed(micro_tokens=amount("--micro-tokens", micro_tokens))
    execution = Execution(recompute=recompute, **passes)
    execution.check()
    parts = conversion_parts(teacher_config(read_config(teacher)), config, gpus, execution)
    Console(width=140).print(cost_table(parts, gpus, device, mfu))


@app.command(hidden=True)
@with_options
def run(
    teacher: Annotated[
        str, typer.Argument(help="Folder or hub name of a Llama, Qwen3 or MiniCPM checkpoint.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; the checkpoint goes to its model/.")
    ],
    layers: LayerOptions,
    trained: TrainedOptions,
    align: AlignOptions,
    distill: DistillOptions,
    long: LongOptions,
    texts: TextOptions,
    machine: MachineOptions,
    recipe: Annotated[
        str,
        typer.Option(
            help="sala, halo, tiny (sala in minutes on a CPU), tiny-halo or smollm2_135m; the other options "
            "change it."
        ),
    ] = "sala",
    resume: Resume = False,
    plan: Plan = False,
    quiet: Quiet = False,
) -> None:
    """Convert a Transformer into the hybrid: alignment, choice of layers, distillation. Under torchrun, on
    all its processes."""
    from ..convert import convert
    from ..convert.config import RECIPES
    from ..convert.opening import published_rate
    from ..convert.teacher import read_config, teacher_config
    from ..model.config import check_choice

    check_choice("recipe", recipe, tuple(RECIPES))
    config = RECIPES[recipe](teacher)
    for group in (layers, trained, texts, machine):
        config = group.apply(config)
    for name, group in (("align", align), ("distill", distill), ("long", long)):
        changes, budget = phase_changes(name, group)
        if name == "distill" and recipe in ("sala", "halo") and "lr" not in changes:
            changes["lr"] = published_rate(teacher_config(read_config(teacher)))
        config = _with_phase(config, name, changes, budget)
    finished = convert(
        config, output, resume=resume, plan_only=plan, quiet=quiet, execution=machine.execution()
    )
    if not plan and finished.name == "model" and int(os.environ.get("RANK", 0)) == 0:
        print(finished)


def _with_phase(config: Any, name: str, changes: dict[str, Any], tokens: str | None) -> Any:
    """The configuration with a phase changed; its steps follow from a budget of tokens, if there is one."""
    phase = getattr(config, name)
    if phase is None and (changes or tokens):
        raise ValueError(f"--{name}-*: this recipe has no such phase; smollm2_135m has one")
    if phase is None:
        return config
    if tokens is not None and "steps" in changes:
        raise ValueError(
            f"--{name}-tokens and --{name}-steps both say how long it lasts: drop one of the two"
        )
    phase = replace(phase, **changes)
    budget = amount(f"--{name}-tokens", tokens)
    if budget is not None:
        phase = phase.for_tokens(budget, config.length, name)
    return replace(config, **{name: phase})
