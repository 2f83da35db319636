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
    tokens: Annotated[int | None, typer.Option(help="To train on at most. Default: all there are.")] = None,
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
            help="sala, halo, tiny (sala in minutes on a CPU), tiny-halo or smollm2_135m; the options below "
            "change it."
        ),
    ] = "sala",
    keep: Annotated[
        str | None,
        typer.Option(
            help="How many layers stay softmax attention (default: 25%), or these very layers, as 0,5,11; "
            "none for no layer."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="These very layers, as 0,5,11, instead of a choice; none for no layer.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="How layers are chosen: halo, recall, kl, retrieval, uniform, first-last-heavy or random."
        ),
    ] = None,
    fix_ends: Annotated[
        bool | None, typer.Option(help="Keep the first and the last layer whatever their scores.")
    ] = None,
    hype: Annotated[bool, typer.Option(help="Take the rotary positions out of the kept layers.")] = True,
    hype_fade: Annotated[
        str | None, typer.Option(help="Tokens of distillation over which they fade out, as 2M; 0: at once.")
    ] = None,
    lightning_nkv: Annotated[
        int | None,
        typer.Option(help="k and v heads of the converted layers; as many as query heads by default."),
    ] = None,
    trainable: Annotated[
        str | None,
        typer.Option(
            help="What the distillation trains: linear (the converted layers), lora (all attention, and "
            "low-rank changes of the rest) or all."
        ),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the feed-forwards' changes.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="How output projections are fitted before the alignment: ridge, scalar or none."),
    ] = None,
    calibrate_tokens: Annotated[str | None, typer.Option(help="Tokens that they are fitted to.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a training sequence.")] = None,
    align_steps: Annotated[int | None, typer.Option(help="Steps of the alignment.")] = None,
    align_tokens: Annotated[str | None, typer.Option(help="Or its tokens, as 3M.")] = None,
    align_batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    align_length: Annotated[int | None, typer.Option(help="Tokens of its sequences.")] = None,
    align_lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    align_last_lr: Annotated[float | None, typer.Option(help="Last learning rate.")] = None,
    align_warmup: Annotated[int | None, typer.Option(help="Steps over which the rate rises.")] = None,
    align_seconds: Annotated[float | None, typer.Option(help="End it after so long.")] = None,
    distill_steps: Annotated[int | None, typer.Option(help="Steps of the distillation.")] = None,
    distill_tokens: Annotated[str | None, typer.Option(help="Or its tokens, as 40M.")] = None,
    distill_batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    distill_length: Annotated[int | None, typer.Option(help="Tokens of its sequences.")] = None,
    distill_lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    distill_last_lr: Annotated[float | None, typer.Option(help="Last learning rate.")] = None,
    distill_warmup: Annotated[int | None, typer.Option(help="Steps over which the rate rises.")] = None,
    distill_seconds: Annotated[
        float | None, typer.Option(help="End it after so long, its rate fallen as if it were over.")
    ] = None,
    long_steps: Annotated[
        int | None, typer.Option(help="Steps of the phase of long sequences, if the recipe has one.")
    ] = None,
    long_tokens: Annotated[str | None, typer.Option(help="Or its tokens, as 4M.")] = None,
    long_batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    long_length: Annotated[int | None, typer.Option(help="Tokens of its sequences.")] = None,
    long_lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    long_seconds: Annotated[float | None, typer.Option(help="End it after so long.")] = None,
    clip: Annotated[float | None, typer.Option(help="Norm to which gradients are clipped.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="File, folder or pattern (JSONL, Parquet, text) to train on, or a folder that convert pack "
            "made; may be repeated. Default: this Python installation's texts."
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help=".npy file or folder of packed tokens to train on instead; may be repeated."),
    ] = None,
    task_share: Annotated[
        float | None, typer.Option(help="Share of sequences with hidden facts and questions, in all phases.")
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
    validate_every: Annotated[
        int | None, typer.Option(help="Steps of distillation between measurements on held-out probes.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of teacher and result: float32, bfloat16 or float16.")
    ] = "float32",
    compute: Annotated[
        str,
        typer.Option(help="Precision of products: float32, bfloat16, or auto (as the machine is faster)."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seconds: Annotated[
        float | None, typer.Option(help="Stop cleanly after so long; --resume goes on from there.")
    ] = None,
    micro_tokens: Annotated[
        str | None, typer.Option(help="Tokens of one forward and backward pass; default 4096.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option(help="Compute layers again in the backward pass instead of keeping them.")
    ] = False,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 1,
    backend: Annotated[
        str | None, typer.Option(help="Of all ops: torch, triton, cpp or naive. Default: by device.")
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
    plan: Plan = False,
    quiet: Quiet = False,
) -> None:
    """Convert a Transformer into the hybrid: alignment, choice of layers, distillation."""
    from ..convert import convert
    from ..convert.config import RECIPES, Execution
    from ..model.config import check_choice

    check_choice("recipe", recipe, tuple(RECIPES))
    base = RECIPES[recipe](teacher)
    if keep is not None and layers is not None:
        raise ValueError("--keep and --layers both say which layers stay: drop one of the two")
    count, chosen = _kept(keep, layers)
    if count is not None:
        base = replace(base, layers=None)
    if task_share is not None:
        base = _of_all_phases(base, task_share=None)
    config = replace(
        base,
        **_given(
            keep=count,
            layers=chosen,
            rule=rule,
            fix_ends=fix_ends,
            trainable=trainable,
            lora_rank=lora_rank,
            calibrate=calibrate,
            calibrate_tokens=_amount("--calibrate-tokens", calibrate_tokens),
            hype_fade=_amount("--hype-fade", hype_fade),
            lightning_nkv=lightning_nkv,
            length=length,
            task_share=task_share,
            save_every=save_every,
            validate_every=validate_every,
            clip=clip,
            sparse_config=_object(sparse_config),
        ),
        hype=hype,
        attn_qk_norm=attn_qk_norm,
        attn_scale_base=attn_scale_base,
        cache_teacher=cache_teacher,
        reuse=reuse,
        dtype=dtype,
        compute=compute,
        device=device,
        seed=seed,
        data=tuple(data or ()),
        tokens=tuple(tokens or ()),
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
    phases = {
        "align": _given(
            steps=align_steps,
            batch=align_batch,
            length=align_length,
            lr=align_lr,
            last_lr=align_last_lr,
            warmup=align_warmup,
            seconds=align_seconds,
        ),
        "distill": _given(
            steps=distill_steps,
            batch=distill_batch,
            length=distill_length,
            lr=distill_lr,
            last_lr=distill_last_lr,
            warmup=distill_warmup,
            seconds=distill_seconds,
        ),
        "long": _given(
            steps=long_steps, batch=long_batch, length=long_length, lr=long_lr, seconds=long_seconds
        ),
    }
    budgets = {"align": align_tokens, "distill": distill_tokens, "long": long_tokens}
    for name, changes in phases.items():
        config = _with_phase(config, name, changes, budgets[name])
    execution = Execution(
        seconds=seconds,
        recompute=recompute,
        log_every=log_every,
        backend=backend,
        **_given(micro_tokens=_amount("--micro-tokens", micro_tokens)),
    )
    finished = convert(config, output, resume=resume, plan_only=plan, quiet=quiet, execution=execution)
    if not plan and finished.name == "model":
        print(finished)


def _kept(keep: str | None, layers: str | None) -> tuple[int | None, tuple[int, ...] | None]:
    """How many layers are kept, or which."""
    if keep is not None and keep.strip().isdigit():
        return int(keep), None
    return None, _numbers("--layers" if keep is None else "--keep", layers if keep is None else keep)


def _with_phase(config: Any, name: str, changes: dict[str, Any], tokens: str | None) -> Any:
    """The configuration with a phase changed; its steps follow from a budget of tokens, if there is one."""
    phase = getattr(config, name)
    if phase is None and (changes or tokens):
        raise ValueError(f"--{name}-*: this recipe has no such phase; smollm2_135m has one")
    if phase is None:
        return config
    phase = replace(phase, **changes)
    amount = _amount(f"--{name}-tokens", tokens)
    if amount is not None:
        phase = phase.for_tokens(amount, config.length, name)
    return replace(config, **{name: phase})


def _of_all_phases(config: Any, **changes: Any) -> Any:
    return replace(config, **{name: replace(phase, **changes) for name, phase in config.phases().items()})


_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def _amount(option: str, text: str | None) -> int | None:
    """A number of tokens, as 3000, 40M or 1.3B."""
    if text is None:
        return None
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        return int(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{option} must be a number of tokens as 300000, 40M or 1.3B, got {text!r}"
        ) from None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None or text == "none":
        return None if text is None else ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers as 0,5,11, or none, got {text!r}") from None


def _object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--sparse-config is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"--sparse-config must be a JSON object, got {text!r}")
    return record
