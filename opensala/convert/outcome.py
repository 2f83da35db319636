"""What a conversion changed, without what it took from the teacher: small enough to send, and exact enough.

outcome.json        the hybrid's configuration, and in which form each tensor lies in the files
outcome-N.safetensors   the tensors: bfloat16, or (`int8`) whole numbers `NAME.q` with a float16
                    scale for each group of 64 along a row, `NAME.s`; low-rank changes as `NAME.lora_a` and
                    `NAME.lora_b`

A tensor with a `base` is a difference from what the teacher's weights become without any training, which is
small, so that eight bits of it are finer than bfloat16 of the whole.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..runs import read_json, write_json
from .lora import lora_parts
from .transfer import assemble

logger = logging.getLogger("opensala")
GROUP = 64
MIB = 2**20
_HEADER = 200  # bytes of a tensor's entry in the head of a file, at most
_NEW = ("o_proj.weight", "z_proj.weight", "o_gate.weight")  # solved or new: no base worth a difference


def _forms(tensors: dict[str, Tensor], limit: int) -> dict[str, str]:
    """`bfloat16` or `int8` for each tensor: the finest that stays within `limit` bytes."""
    choices: list[dict[str, str]] = [
        dict.fromkeys(tensors, "bfloat16"),
        {
            name: "int8" if x.dim() == 2 and not name.endswith(_NEW) and ".lora_" not in name else "bfloat16"
            for name, x in tensors.items()
        },
        {
            name: "int8" if x.dim() == 2 and ".lora_" not in name else "bfloat16"
            for name, x in tensors.items()
        },
    ]
    for forms in choices:
        size = sum(
            _HEADER + 2 * x.numel()
            if forms[name] == "bfloat16"
            else 2 * _HEADER + x.numel() + 2 * x.numel() // _group(x)
            for name, x in tensors.items()
        )
        if size <= limit:
            return forms
    logger.warning("the outcome takes %.1f MiB even in eight bits, more than %.1f", size / MIB, limit / MIB)
    return choices[-1]


def _group(x: Tensor) -> int:
    return GROUP if x.shape[1] % GROUP == 0 else x.shape[1]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[out, in]` -> int8 of the same shape, and float16 scales `[out, in / 64]` (one a row, if 64 does not
    divide it)."""
    groups = x.float().unflatten(1, (-1, _group(x)))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-24).half()
    return (groups / scale.float()).round().clamp(-127, 127).to(torch.int8).flatten(1), scale[..., 0]


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 matrix of `quantise`."""
    return (q.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]).flatten(1)


@torch.no_grad()
def save_outcome(
    teacher: MiniCPMSALAForCausalLM,
    student: MiniCPMSALAForCausalLM,
    folder: Path,
    *,
    limit_mib: float = 62.0,
    file_mib: float = 15.0,
) -> None:
    """Write what the student's trained parameters and low-rank changes differ by from the untrained hybrid.

    Args:
        student: as it was trained, low-rank changes not yet merged.
        folder: made here; nothing of an older outcome may be in it.
        limit_mib: size of all files together; tensors are written in eight bits where they must be.
        file_mib: most of one file.
    """
    folder.mkdir(parents=True)
    base = assemble(teacher, student.config).state_dict()
    tensors: dict[str, Tensor] = {}
    based = set()
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad or ".lora_" in name:
            continue
        value = parameter.detach().float().cpu()
        if not name.endswith(_NEW):
            value = value - base[name].float().cpu()
            based.add(name)
        tensors[name] = value
    for name, (a, b) in lora_parts(student).items():
        tensors |= {f"{name}.lora_a": a.float().cpu(), f"{name}.lora_b": b.float().cpu()}
    forms = _forms(tensors, int(limit_mib * MIB))
    written: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if forms[name] == "int8":
            written[f"{name}.q"], written[f"{name}.s"] = quantise(x)
        else:
            written[name] = x.bfloat16()
    files = _shards(written, int(file_mib * MIB))
    for n, part in enumerate(files):
        save_file({k: v.contiguous() for k, v in part.items()}, folder / f"outcome-{n}.safetensors")
    record = {
        "config": student.config.to_diff_dict(),
        "base": sorted(based),
        "int8": sorted(name for name, form in forms.items() if form == "int8"),
    }
    write_json(folder / "outcome.json", record)


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
    record: dict[str, Any] | None = read_json(Path(folder) / "outcome.json")
    if record is None:
        raise ValueError(f"{folder} holds no outcome.json: give the outcome folder of a conversion")
    config = MiniCPMSALAConfig(**record["config"])
    student = assemble(teacher, config)
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("outcome-*.safetensors")):
        tensors |= load_file(file)
    for name in record["int8"]:
        tensors[name] = dequantise(tensors.pop(f"{name}.q"), tensors.pop(f"{name}.s"))
    own, based = dict(student.named_parameters()), set(record["base"])
    for name, x in tensors.items():
        if name.endswith(".lora_b"):
            continue
        if name.endswith(".lora_a"):
            name = name.removesuffix(".lora_a")
            x = tensors[f"{name}.lora_b"].float() @ x.float()
        target: nn.Parameter | None = own.get(name)
        if target is None or target.shape != x.shape:
            raise ValueError(f"{folder}: {name} has no place in a hybrid of this teacher")
        if name in based or f"{name}.lora_a" in tensors:
            target.add_(x.to(target))
        else:
            target.copy_(x.to(target))
    return student
