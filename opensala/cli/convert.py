"""`opensala convert`: the arguments of a conversion and of `opensala convert select`. Parsing only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .group import RunUnlessNamed
from .options import Plan, Quiet, Resume

app = typer.Typer(
    cls=RunUnlessNamed,
    add_completion=False,
    rich_markup_mode=None,
    help="Convert a Transformer into the hybrid (convert TEACHER -o DIR), or choose layers from scores "
    "(convert select).",
)

Seed = Annotated[int, typer.Option(help="Seed of data order and of the rule random.")]
FixEnds = Annotated[bool, typer.Option(help="Keep the first and the last layer whatever their scores.")]
Rule = Annotated[str, typer.Option(help="halo, recall, kl, uniform, first-last-heavy or random.")]


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


@app.command(hidden=True)
def run(
    teacher: Annotated[
        str, typer.Argument(help="Folder or hub name of a Llama, Qwen3 or MiniCPM checkpoint.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; the checkpoint goes to its model/.")
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help="sala, halo, tiny (sala in minutes on a CPU) or tiny-halo; the options below change it."
        ),
    ] = "sala",
    keep: Annotated[
        int | None, typer.Option(help="Layers that stay softmax attention. Default: 25%.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="These very layers, as 0,5,11, instead of a choice; none for no layer.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="How layers are chosen: halo, recall, kl, uniform, first-last-heavy or random."),
    ] = None,
    fix_ends: Annotated[
        bool | None, typer.Option(help="Keep the first and the last layer whatever their scores.")
    ] = None,
    hype: Annotated[bool, typer.Option(help="Take the rotary positions out of the kept layers.")] = True,
    trainable: Annotated[
        str | None, typer.Option(help="What the distillation trains: linear (the converted layers) or all.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a training sequence.")] = None,
    align_steps: Annotated[int | None, typer.Option(help="Steps of the alignment.")] = None,
    align_batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    align_lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    distill_steps: Annotated[int | None, typer.Option(help="Steps of the distillation.")] = None,
    distill_batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    distill_lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file or folder to train on; may be repeated. Default: this Python installation's "
            "texts."
        ),
    ] = None,
    task_share: Annotated[
        float | None, typer.Option(help="Share of sequences with hidden facts and questions.")
    ] = None,
    probe_length: Annotated[int | None, typer.Option(help="Tokens of a probe.")] = None,
    probe_sequences: Annotated[
        int | None, typer.Option(help="Documents with hidden facts, and texts, to score each layer with.")
    ] = None,
    recall_tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks for recall instead of the built-in probe, as a,b.")
    ] = None,
    general_tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks for general ability instead, as a,b.")
    ] = None,
    attn_qk_norm: Annotated[
        bool,
        typer.Option(help="Add QK-norm to kept layers of a teacher without (an extension of the format)."),
    ] = False,
    attn_scale_base: Annotated[
        float | None,
        typer.Option(
            help="Length scaling of the kept layers' logits, near 500 (an extension of the format)."
        ),
    ] = None,
    sparse_config: Annotated[
        str | None, typer.Option(help='Changes to the released block selection, as JSON: {"topk": 32}.')
    ] = None,
    cache_teacher: Annotated[
        bool, typer.Option(help="Keep the teacher's final states on disk instead of running it beside.")
    ] = False,
    reuse: Annotated[
        str | None, typer.Option(help="Run folder whose aligned mixers and scores to take over.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between saved states.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of teacher and result: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Seed = 0,
    resume: Resume = False,
    plan: Plan = False,
    quiet: Quiet = False,
) -> None:
    """Convert a Transformer into the hybrid: alignment, choice of layers, distillation."""
    from ..convert import convert
    from ..convert.config import RECIPES
    from ..model.config import check_choice

    check_choice("recipe", recipe, tuple(RECIPES))
    base = RECIPES[recipe](teacher)
    config = replace(
        base,
        **_given(
            keep=keep,
            layers=_numbers(layers),
            rule=rule,
            fix_ends=fix_ends,
            trainable=trainable,
            length=length,
            task_share=task_share,
            save_every=save_every,
        ),
        hype=hype,
        attn_qk_norm=attn_qk_norm,
        attn_scale_base=attn_scale_base,
        cache_teacher=cache_teacher,
        reuse=reuse,
        dtype=dtype,
        device=device,
        seed=seed,
        data=tuple(data or ()),
        sparse_config=_object(sparse_config),
        align=replace(base.align, **_given(steps=align_steps, batch=align_batch, lr=align_lr)),
        distill=replace(base.distill, **_given(steps=distill_steps, batch=distill_batch, lr=distill_lr)),
        probes=replace(
            base.probes,
            **_given(
                length=probe_length,
                sequences=probe_sequences,
                recall_tasks=_names(recall_tasks),
                general_tasks=_names(general_tasks),
            ),
        ),
    )
    finished = convert(config, output, resume=resume, plan_only=plan, quiet=quiet)
    if not plan:
        print(finished)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None or text == "none":
        return None if text is None else ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers must be numbers as 0,5,11, or none, got {text!r}") from None


def _object(text: str | None) -> dict[str, Any]:
    try:
        record = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"--sparse-config is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"--sparse-config must be a JSON object, got {text!r}")
    return record
