"""From a checkpoint to a quantised one beside it, with a report of what that cost.

The new folder appears whole or not at all. What the model does not learn from (tokenizer, chat template,
generation settings, licence) is copied byte for byte: a tokenizer written anew can split text otherwise.
"""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers.utils import cached_file

from .. import hub
from ..engine import Engine, EngineOptions, load_engine, shipped_model
from ..engine.load import checkpoint_config
from ..engine.precision import own_dtype
from ..model import MiniCPMSALAForCausalLM
from ..model.gptq_config import GptqLayoutConfig
from ..model.quantised import quantised_layers
from ..ops.linear.gptq import BITS
from ..runs.folder import write_json
from ..runs.progress import progress_bar
from .gptq import DAMPING
from .layers import DEFAULT_KINDS, checked_kinds, left_out
from .model import LayerError, check_sizes, quantise_model
from .quality import Quality, calibration_ids, measure_quality

logger = logging.getLogger("opensala")
REPORT = "quantization.json"
_OF_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "config.json")
_WORST = 5  # layers named in the table


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        model: folder or hub name, or name of a pulled model; None for the one that ships.
        bits: 4 or 8.
        group_size: columns that share a scale; -1 for whole rows.
        kinds: of `layers.KINDS`.
        sequences, length: of calibration text, in tokens.
        questions: of retrieval, before and after; 0 for none.
        document_tokens: length of the documents that they are about.

    Raises:
        ValueError: a number out of its range.
    """

    model: str | None = None
    bits: int = 4
    group_size: int = 128
    kinds: tuple[str, ...] = DEFAULT_KINDS
    sequences: int = 32
    length: int = 1024
    questions: int = 24
    document_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"--bits must be 4 or 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"--group-size must be at least 1, or -1 for whole rows, got {self.group_size}")
        least = {"sequences": 1, "length": 64, "questions": 0, "document_tokens": 256}
        for name, low in least.items():
            if getattr(self, name) < low:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} must be at least {low}, got {getattr(self, name)}")


def quantise_checkpoint(plan: Plan, output: str | Path, quiet: bool = False) -> dict[str, Any]:
    """Quantise a checkpoint into the folder `output`; returns the report, which lies there too.

    Raises:
        ValueError: an output folder that exists, a model that is quantised already, layers that do not fit
            the group size, or what loading a checkpoint raises.
    """
    target = Path(output)
    if target.exists():
        raise ValueError(f"{target} exists: name a new folder with -o")
    own = own_dtype(checkpoint_config(plan.model))
    engine = load_engine(
        plan.model, device="cpu", dtype="float32", options=EngineOptions(max_cached_tokens=1 << 16)
    )
    model = engine.model
    kinds = checked_kinds(plan.kinds, model)
    count = check_sizes(model, kinds, plan.bits, plan.group_size)
    if not count:
        raise ValueError(f"the model has no layers of the kinds {', '.join(kinds)}")
    length = min(plan.length, engine.config.max_position_embeddings)
    with progress_bar("before", plan.questions, quiet=quiet) as bar:
        before = _quality(engine, plan, length, bar.advance)
    ids = calibration_ids(engine, plan.sequences, length, plan.seed)
    with progress_bar(f"{plan.bits} bits", count, quiet=quiet) as bar:
        errors = quantise_model(
            model, ids, kinds=kinds, bits=plan.bits, group=plan.group_size, done=bar.advance
        )
    with progress_bar("after", plan.questions, quiet=quiet) as bar:
        again = Engine(model, engine.tokenizer, engine.options, name=engine.name)
        after = _quality(again, plan, length, bar.advance)
    report = _report(plan, kinds, model, errors, {"before": before, "after": after})
    source = _source_folder(plan.model)
    with hub.building(target, 4 * sum(p.nbytes for p in model.state_dict().values())) as partial:
        _write(model, source, partial, plan, own)
        write_json(partial / REPORT, report)
    if not quiet:
        _show(report)
    return report


def _quality(engine: Engine, plan: Plan, length: int, done: Any) -> Quality:
    return measure_quality(
        engine,
        length=length,
        questions=plan.questions,
        document_tokens=plan.document_tokens,
        done=done,
    )


def _report(
    plan: Plan,
    kinds: tuple[str, ...],
    model: MiniCPMSALAForCausalLM,
    errors: list[LayerError],
    quality: Mapping[str, Quality],
) -> dict[str, Any]:
    layers = quantised_layers(model)
    taken = sum(x.nbytes for layer in layers.values() for x in layer.state_dict().values())
    in_bf16 = sum(2 * layer.in_features * layer.out_features for layer in layers.values())
    return {
        "bits": plan.bits,
        "group_size": plan.group_size,
        "kinds": list(kinds),
        "calibration": {"sequences": plan.sequences, "tokens": plan.length, "seed": plan.seed},
        "layers": [asdict(e) for e in errors],
        "quantised_bytes": taken,
        "bfloat16_bytes": in_bf16,
        "share_of_bfloat16": round(taken / in_bf16, 4),
        **{when: asdict(q) for when, q in quality.items()},
    }


def _source_folder(model: str | None) -> Path:
    """Where the files of a checkpoint lie on this machine."""
    found = shipped_model() if model is None else hub.checkpoint_folder(model)
    if Path(found).is_dir():
        return Path(found)
    return Path(str(cached_file(str(found), "config.json"))).parent


def _write(model: MiniCPMSALAForCausalLM, source: Path, folder: Path, plan: Plan, own: torch.dtype) -> None:
    for parameter in model.parameters():  # what stays as it was lies there in the dtype it came in
        parameter.data = parameter.data.to(own)
    out = left_out(model, quantised_layers(model).keys())
    model.config.quantization_config = GptqLayoutConfig(
        bits=plan.bits,
        group_size=plan.group_size,
        damp_percent=DAMPING,
        true_sequential=True,
        static_groups=False,
        lm_head="lm_head" not in out,
        dynamic=_exceptions(out),  # how GPTQModel and vLLM are told which linear layers are none of theirs
        meta={"quantizer": ["opensala"]},
    )
    model.save_pretrained(folder)
    _copy_others(source, folder)
    path = folder / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record.pop("auto_map", None)  # names code of the source's own folder
    write_json(path, record)
    _verify(model, folder)


def _exceptions(names: list[str]) -> dict[str, dict[str, Any]]:
    """Names of layers that are not quantised as patterns, one for each name below a decoder layer."""
    patterns = defaultdict(list)
    for name in names:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            patterns[".".join(parts[3:])].append(parts[2])
        else:
            patterns[name].append("")
    found: dict[str, dict[str, Any]] = {}
    for own, numbers in patterns.items():
        dotted = own.replace(".", r"\.")
        layers = rf"model\.layers\.({'|'.join(numbers)})\." if numbers != [""] else ""
        found[f"-:^{layers}{dotted}$"] = {}
    return found


def _copy_others(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in (*_OF_WEIGHTS, REPORT)):
            shutil.copyfile(path, folder / path.name)


def _verify(model: MiniCPMSALAForCausalLM, folder: Path) -> None:
    """Read what was written: every quantised tensor must be the one that the report was made with."""
    wanted = {
        f"{name}.{own}": tensor
        for name, layer in quantised_layers(model).items()
        for own, tensor in layer.state_dict().items()
    }
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 -- it is no dictionary
                there = wanted.pop(key, None)
                if there is not None and not torch.equal(there, opened.get_tensor(key)):
                    raise ValueError(f"{folder}: {key} does not read as it was written; is the disk failing?")
    if wanted:
        raise ValueError(f"{folder}: {next(iter(wanted))} was not written")


def _show(report: dict[str, Any]) -> None:
    console = Console(stderr=True)
    table = Table(box=None, pad_edge=False)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = report["before"], report["after"]
    table.add_row("perplexity", f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}")
    for name, label in (("found", "facts found"), ("ended", "answers that ended")):
        table.add_row(label, *(f"{q[name]} of {q['asked']}" for q in (before, after)))
    console.print(table)
    share = report["share_of_bfloat16"]
    console.print(
        f"{len(report['layers'])} layers in {report['quantised_bytes'] / 2**20:.1f} MiB, {share:.0%} of "
        "their size in bfloat16",
        highlight=False,
    )
    worst = sorted(report["layers"], key=lambda e: -e["error"])[:_WORST]
    named = ", ".join(f"{e['name']} {e['error']:.1%}" for e in worst)
    console.print(f"relative error of outputs, the largest: {named}", highlight=False)
