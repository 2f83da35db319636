"""The options of a conversion in groups, and what each group makes of a recipe."""

import json
from dataclasses import dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..convert import ConvertConfig
    from ..convert.config import Execution

Text = str | None
Number = float | None
Count = int | None
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}

_PHASE = (
    ("steps", Count, "Optimizer steps."),
    ("tokens", Text, "Or its tokens, as 40M."),
    ("batch", Count, "Sequences a step."),
    ("length", Count, "Tokens of its sequences."),
    ("lr", Number, "Peak learning rate."),
    ("last_lr", Number, "Last learning rate."),
    ("warmup", Count, "Steps over which the rate rises."),
    ("seconds", Number, "End it after so long, its rate fallen as if it were over."),
)


def _phase(name: str, whose: str) -> Any:
    """A group with the numbers of a phase."""
    fields = [
        (f"{name}_{key}", Annotated[kind, typer.Option(help=f"{whose} {help}")], None)
        for key, kind, help in _PHASE
    ]
    return make_dataclass(f"{name.capitalize()}Options", fields)


if TYPE_CHECKING:  # made below; to a type checker a group of options is like any other
    AlignOptions = Any
    DistillOptions = Any
    LongOptions = Any
else:
    AlignOptions = _phase("align", "Of the alignment:")
    DistillOptions = _phase("distill", "Of the distillation:")
    LongOptions = _phase("long", "Of the phase of long sequences, if the recipe has one:")


def phase_changes(name: str, options: Any) -> tuple[dict[str, Any], str | None]:
    """What a group changes in its phase, and the budget in tokens it names."""
    numbers = {key: getattr(options, f"{name}_{key}") for key, _, _ in _PHASE}
    tokens = numbers.pop("tokens")
    return changed(**numbers), tokens


@dataclass
class LayerOptions:
    """Which layers stay, and what becomes of the others."""

    keep: Annotated[
        Text,
        typer.Option(
            help="How many layers stay softmax attention (default: 25%), or these very layers, as 0,5,11; "
            "none for no layer."
        ),
    ] = None
    layers: Annotated[
        Text, typer.Option(help="These very layers, as 0,5,11, instead of a choice; none for no layer.")
    ] = None
    rule: Annotated[
        Text,
        typer.Option(
            help="How layers are chosen: halo, recall, kl, retrieval, uniform, first-last-heavy or random."
        ),
    ] = None
    fix_ends: Annotated[
        bool | None, typer.Option(help="Keep the first and the last layer whatever their scores.")
    ] = None
    hype: Annotated[bool, typer.Option(help="Take the rotary positions out of the kept layers.")] = True
    hype_fade: Annotated[
        Text, typer.Option(help="Tokens of distillation over which they fade out, as 2M; 0: at once.")
    ] = None
    lightning_nkv: Annotated[
        Count,
        typer.Option(help="k and v heads of the converted layers; as many as query heads by default."),
    ] = None
    attn_qk_norm: Annotated[
        bool,
        typer.Option(help="Add QK-norm to kept layers of a teacher without (an extension of the format)."),
    ] = False
    attn_scale_base: Annotated[
        Number,
        typer.Option(
            help="Length scaling of the kept layers' logits, near 500 (an extension of the format)."
        ),
    ] = None
    sparse_config: Annotated[
        Text, typer.Option(help='Changes to the released block selection, as JSON: {"topk": 32}.')
    ] = None

    def apply(self, base: "ConvertConfig") -> "ConvertConfig":
        """A recipe with these changes."""
        if self.keep is not None and self.layers is not None:
            raise ValueError("--keep and --layers both say which layers stay: drop one of the two")
        count, chosen = _kept(self.keep, self.layers)
        if count is not None:
            base = replace(base, layers=None)
        return replace(
            base,
            **given(self, "rule", "fix_ends", "lightning_nkv"),
            **changed(
                keep=count,
                layers=chosen,
                hype_fade=amount("--hype-fade", self.hype_fade),
                sparse_config=_object(self.sparse_config),
            ),
            hype=self.hype,
            attn_qk_norm=self.attn_qk_norm,
            attn_scale_base=self.attn_scale_base,
        )


@dataclass
class TrainedOptions:
    """What is trained, and from which start."""

    trainable: Annotated[
        Text,
        typer.Option(
            help="What the distillation trains: linear (the converted layers), lora (all attention, and "
            "low-rank changes of the rest) or all."
        ),
    ] = None
    lora_rank: Annotated[Count, typer.Option(help="Rank of the feed-forwards' changes.")] = None
    calibrate: Annotated[
        Text,
        typer.Option(help="How output projections are fitted before the alignment: ridge, scalar or none."),
    ] = None
    calibrate_tokens: Annotated[Text, typer.Option(help="Tokens that they are fitted to.")] = None
    clip: Annotated[Number, typer.Option(help="Norm to which gradients are clipped.")] = None
    cache_teacher: Annotated[
        bool, typer.Option(help="Keep the teacher's final states on disk instead of running it beside.")
    ] = False
    reuse: Annotated[Text, typer.Option(help="Run folder whose aligned mixers and scores to take over.")] = (
        None
    )
    start: Annotated[
        Text, typer.Option(help="Outcome of an earlier conversion to train on, instead of an alignment.")
    ] = None
    dtype: Annotated[str, typer.Option(help="Of teacher and result: float32, bfloat16 or float16.")] = (
        "float32"
    )
    seed: Annotated[int, typer.Option(help="Seed of data order and of the rule random.")] = 0

    def apply(self, base: "ConvertConfig") -> "ConvertConfig":
        """A recipe with these changes."""
        return replace(
            base,
            **given(self, "trainable", "lora_rank", "calibrate", "clip"),
            **changed(calibrate_tokens=amount("--calibrate-tokens", self.calibrate_tokens)),
            cache_teacher=self.cache_teacher,
            reuse=self.reuse,
            start=self.start,
            dtype=self.dtype,
            seed=self.seed,
        )


@dataclass
class TextOptions:
    """What is trained on and measured with."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            help="File, folder or pattern (JSONL, Parquet, text) to train on, or a folder that convert pack "
            "made; may be repeated. Default: this Python installation's texts."
        ),
    ] = None
    tokens: Annotated[
        list[str] | None,
        typer.Option(help=".npy file or folder of packed tokens to train on instead; may be repeated."),
    ] = None
    length: Annotated[Count, typer.Option(help="Tokens of a training sequence.")] = None
    task_share: Annotated[
        Number, typer.Option(help="Share of sequences with hidden facts and questions, in all phases.")
    ] = None
    probe_length: Annotated[Count, typer.Option(help="Tokens of a probe.")] = None
    probe_sequences: Annotated[
        Count, typer.Option(help="Documents with hidden facts, and texts, to score each layer with.")
    ] = None
    probe_batch: Annotated[Count, typer.Option(help="Of them, how many are read together.")] = None
    recall_tasks: Annotated[
        Text, typer.Option(help="lm-eval tasks for recall instead of the built-in probe, as a,b.")
    ] = None
    general_tasks: Annotated[
        Text, typer.Option(help="lm-eval tasks for general ability instead, as a,b.")
    ] = None

    def apply(self, base: "ConvertConfig") -> "ConvertConfig":
        """A recipe with these changes."""
        if self.task_share is not None:  # of every phase, whatever the recipe says of one
            phases: dict[str, Any] = {n: replace(p, task_share=None) for n, p in base.phases().items()}
            base = replace(base, **phases)
        probes = changed(
            length=self.probe_length,
            sequences=self.probe_sequences,
            batch=self.probe_batch,
            recall_tasks=_names(self.recall_tasks),
            general_tasks=_names(self.general_tasks),
        )
        return replace(
            base,
            **given(self, "length", "task_share"),
            data=tuple(self.data or ()),
            tokens=tuple(self.tokens or ()),
            probes=replace(base.probes, **probes),
        )


@dataclass
class MachineOptions:
    """How this machine carries it out."""

    compute: Annotated[
        str,
        typer.Option(help="Precision of products: float32, bfloat16, or auto (as the machine is faster)."),
    ] = "auto"
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu"
    seconds: Annotated[
        Number, typer.Option(help="Stop cleanly after so long; --resume goes on from there.")
    ] = None
    micro_tokens: Annotated[
        Text, typer.Option(help="Tokens of one forward and backward pass; default 4096.")
    ] = None
    recompute: Annotated[
        bool, typer.Option(help="Compute layers again in the backward pass instead of keeping them.")
    ] = False
    save_every: Annotated[Count, typer.Option(help="Steps between saved states.")] = None
    validate_every: Annotated[
        Count, typer.Option(help="Steps of distillation between measurements on held-out probes.")
    ] = None
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 1
    backend: Annotated[
        Text, typer.Option(help="Of all ops: torch, triton, cpp or naive. Default: by device.")
    ] = None

    def apply(self, base: "ConvertConfig") -> "ConvertConfig":
        """A recipe with these changes."""
        every = given(self, "save_every", "validate_every")
        return replace(base, **every, compute=self.compute, device=self.device)

    def execution(self) -> "Execution":
        """What may differ from one resumption to the next."""
        from ..convert.config import Execution

        return Execution(
            seconds=self.seconds,
            recompute=self.recompute,
            log_every=self.log_every,
            backend=self.backend,
            **changed(micro_tokens=amount("--micro-tokens", self.micro_tokens)),
        )


def changed(**options: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


def given(group: Any, *names: str) -> dict[str, Any]:
    """Of these options of a group, whose fields of the recipe have the same names, those that were given."""
    return changed(**{name: getattr(group, name) for name in names})


def amount(option: str, text: str | None) -> int | None:
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


def _kept(keep: str | None, layers: str | None) -> tuple[int | None, tuple[int, ...] | None]:
    """How many layers are kept, or which."""
    if keep is not None and keep.strip().isdigit():
        return int(keep), None
    return None, _numbers("--layers" if keep is None else "--keep", layers if keep is None else keep)


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
