"""What a conversion changed, without what it took from the teacher: small enough to send, and exact enough.

outcome.json        the hybrid's configuration, and in which form each tensor lies in the files
outcome-N.safetensors   the tensors: bfloat16, or (`bits` names them) whole numbers of 4, 5, 6 or 8 bits
                    `NAME.q` with a float16 scale for each group of 64 along a row, `NAME.s`; low-rank changes
                    as `NAME.lora_a` and `NAME.lora_b`

A tensor with a `base` is a difference from what the teacher's weights become without any training, which is
small, so that eight bits of it are finer than bfloat16 of the whole. Outcomes of before `bits` list those in
eight bits as `int8`.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..parallel import whole_tensor
from ..runs import read_json, write_json
from .lora import lora_parts
from .moments import input_moments
from .ranks import Ranks
from .transfer import assemble
from .widths import choose_widths, dequantise, power_of, quantise, size_of

logger = logging.getLogger("opensala")
MIB = 2**20
_HEADER = 200  # bytes of a tensor's entry in the head of a file, at most


@torch.no_grad()
def save_outcome(
    teacher: MiniCPMSALAForCausalLM,
    student: MiniCPMSALAForCausalLM,
    folder: Path,
    *,
    limit_mib: float = 62.0,
    file_mib: float = 15.0,
    ranks: Ranks | None = None,
) -> None:
    """Write what the student's trained parameters and low-rank changes differ by from the untrained hybrid.

    Args:
        student: as it was trained, low-rank changes not yet merged.
        folder: made here; nothing of an older outcome may be in it.
        limit_mib: size of all files together; tensors are written in as few bits as that takes.
        file_mib: most of one file.
        ranks: all of them call it; the first one writes.
    """
    tensors = {
        name: whole_tensor(parameter.detach()).float().cpu()
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }
    for name, (a, b) in lora_parts(student).items():
        tensors |= {f"{name}.lora_a": a.float().cpu(), f"{name}.lora_b": b.float().cpu()}
    whole = untrained_weights(teacher, student.config)
    based = set()
    for name, value in tensors.items():
        if name in whole and (value - whole[name]).norm() < value.norm():
            tensors[name] = value - whole[name]
            based.add(name)
    config = student.config.to_diff_dict()
    (ranks or Ranks()).first(
        lambda: write_tensors(folder, config, tensors, based, whole, limit_mib, file_mib)
    )


def untrained_weights(teacher: MiniCPMSALAForCausalLM, config: MiniCPMSALAConfig) -> dict[str, Tensor]:
    """The weights of the hybrid before any training, float32, by name."""
    return {name: x.float().cpu() for name, x in assemble(teacher, config).state_dict().items()}


@torch.no_grad()
def shrink_outcome(
    teacher: MiniCPMSALAForCausalLM,
    outcome: str | Path,
    folder: Path,
    *,
    limit_mib: float,
    file_mib: float = 15.0,
    tokens: Tensor | None = None,
) -> None:
    """Write an outcome again in fewer bytes; arguments as of `save_outcome`.

    Args:
        tokens: `[n, length]`, ids of a text: what the matrices are given when the hybrid reads it says which
            of their errors count. None takes all inputs as alike.

    Raises:
        ValueError: what `load_outcome` refuses.
    """
    record, tensors = read_outcome(Path(outcome))
    whole = untrained_weights(teacher, MiniCPMSALAConfig(**record["config"]))
    based = set(record["base"])
    for name, value in tensors.items():
        if name not in based and name in whole and (value - whole[name]).norm() < value.norm():
            tensors[name] = value - whole[name]
            based.add(name)
    moments = None if tokens is None else input_moments(load_outcome(teacher, outcome), set(tensors), tokens)
    write_tensors(folder, record["config"], tensors, based, whole, limit_mib, file_mib, moments)


def write_tensors(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    based: set[str],
    whole: dict[str, Tensor],
    limit_mib: float,
    file_mib: float,
    moments: dict[str, Tensor] | None = None,
) -> None:
    folder.mkdir(parents=True)
    moments = moments or {}
    limit = int(limit_mib * MIB)
    widths = choose_widths(tensors, _weights(tensors, based, whole, moments), limit, _HEADER, moments)
    size = sum(size_of(x, widths[name]) for name, x in tensors.items())
    if size > limit:
        logger.warning("the outcome takes %.1f MiB at its smallest, more than %.1f", size / MIB, limit_mib)
    written: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if widths[name] < 16:
            written[f"{name}.q"], written[f"{name}.s"] = quantise(x, widths[name], moments.get(name))
        else:
            written[name] = x.bfloat16()
    for n, part in enumerate(_shards(written, int(file_mib * MIB))):
        save_file({k: v.contiguous() for k, v in part.items()}, folder / f"outcome-{n}.safetensors")
    bits = {name: width for name, width in sorted(widths.items()) if width < 16}
    write_json(folder / "outcome.json", {"config": config, "base": sorted(based), "bits": bits})


def _weights(
    tensors: dict[str, Tensor], based: set[str], whole: dict[str, Tensor], moments: dict[str, Tensor]
) -> dict[str, float]:
    """What a squared error of each tensor counts: errors are relative to the matrix they end up in."""
    weights = {}
    for name, x in tensors.items():
        plain, _, factor = name.partition(".lora_")
        target = x + whole[name] if name in based else whole[plain] if factor else x
        weights[name] = 1 / max(power_of(target, moments.get(name)), 1e-30)
        if factor:  # a relative error of a factor is one of the product
            change = tensors[f"{plain}.lora_b"] @ tensors[f"{plain}.lora_a"]
            weights[name] *= float(change.square().sum()) / max(float(x.square().sum()), 1e-30)
    return weights


def _shards(tensors: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Tensors in parts of at most so many bytes, in order."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, x in tensors.items():
        bytes_ = x.numel() * x.element_size() + _HEADER
        if parts[-1] and size + bytes_ > most:
            parts.append({})
            size = 0
        parts[-1][name] = x
        size += bytes_
    return parts


@torch.no_grad()
def load_outcome(teacher: MiniCPMSALAForCausalLM, folder: str | Path) -> MiniCPMSALAForCausalLM:
    """The hybrid of a teacher and an outcome, low-rank changes merged.

    Raises:
        ValueError: a folder without an outcome, or one of another teacher's shape.
    """
    record, tensors = read_outcome(Path(folder))
    config = MiniCPMSALAConfig(**record["config"])
    student = assemble(teacher, config)
    own, based = dict(student.named_parameters()), set(record["base"])
    for name, x in tensors.items():
        if name.endswith(".lora_b"):
            continue
        if name.endswith(".lora_a"):
            name = name.removesuffix(".lora_a")
            x = _product(tensors[f"{name}.lora_b"], x)
        target: nn.Parameter | None = own.get(name)
        if target is None or target.shape != x.shape:
            raise ValueError(f"{folder}: {name} has no place in a hybrid of this teacher")
        if name in based or f"{name}.lora_a" in tensors:
            target.add_(x.to(target))
        else:
            target.copy_(x.to(target))
    return student


def _product(b: Tensor, a: Tensor) -> Tensor:
    """B A, summed in one order whatever the machine, so that an assembled model has one checksum."""
    total = b[:, :1] * a[:1]
    for n in range(1, a.shape[0]):
        total = total + b[:, n : n + 1] * a[n : n + 1]
    return total


def read_outcome(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of an outcome, and its tensors in float32; ValueError for a folder that holds none."""
    record: dict[str, Any] | None = read_json(folder / "outcome.json")
    if record is None:
        raise ValueError(f"{folder} holds no outcome.json: give the outcome folder of a conversion")
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("outcome-*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): copy the outcome again") from error
    bits = record.get("bits") or dict.fromkeys(record.get("int8", ()), 8)
    missing = [name for name in bits if f"{name}.q" not in tensors or f"{name}.s" not in tensors]
    if missing:
        raise ValueError(f"{folder} lacks the tensor {missing[0]}: copy the outcome again")
    for name, width in bits.items():
        tensors[name] = dequantise(tensors.pop(f"{name}.q"), tensors.pop(f"{name}.s"), width)
    return record, {name: x.float() for name, x in tensors.items()}
