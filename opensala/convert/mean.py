"""The mean of two conversions' outcomes, for a run that went on from another and lost some of what it knew.

Weights between a model and what further training made of it often have the good of both (WiSE-FT, arXiv
2109.01903).
"""

from pathlib import Path

import torch
from torch import Tensor

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from .outcome import read_outcome, untrained_weights, write_tensors

Factors = dict[str, Tensor]


@torch.no_grad()
def mean_outcome(
    teacher: MiniCPMSALAForCausalLM,
    first: str | Path,
    second: str | Path,
    folder: Path,
    *,
    share: float = 0.5,
    rank: int = 16,
    limit_mib: float = 62.0,
    file_mib: float = 15.0,
) -> float:
    """Write the outcome whose weights are (1 - share) * first + share * second; configuration of the second.

    Args:
        rank: of the low-rank changes, whose mean has the rank of both together.

    Returns:
        How much of the mean low-rank changes, in squares, that rank holds: the least of all matrices.

    Raises:
        ValueError: a share outside 0 to 1, or outcomes of different tensors.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be 0 to 1, got {share}")
    (_, old), (record, new) = (_absolute(teacher, Path(path)) for path in (first, second))
    if old.keys() != new.keys():
        apart = sorted(old.keys() ^ new.keys())
        raise ValueError(f"{first} and {second} changed different tensors: {apart[0]}")
    whole = untrained_weights(teacher, MiniCPMSALAConfig(**record["config"]))
    tensors: dict[str, Tensor] = {}
    based, held = set(), [1.0]
    for name, x in new.items():
        plain, _, factor = name.rpartition(".")
        if factor == "lora_b":
            continue
        if factor == "lora_a":
            tensors[name], tensors[f"{plain}.lora_b"], kept = _low_rank(old, new, plain, share, rank)
            held.append(kept)
            continue
        mean = share * x + (1 - share) * old[name]
        if name in whole and (mean - whole[name]).norm() < mean.norm():
            mean = mean - whole[name]
            based.add(name)
        tensors[name] = mean
    write_tensors(folder, record["config"], tensors, based, whole, limit_mib, file_mib)
    return min(held)


def _absolute(teacher: MiniCPMSALAForCausalLM, folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The record of an outcome, and its tensors, none as a difference."""
    record, tensors = read_outcome(folder)
    whole = untrained_weights(teacher, MiniCPMSALAConfig(**record["config"]))
    return record, {name: x + whole[name] if name in record["base"] else x for name, x in tensors.items()}


def _low_rank(
    old: Factors, new: Factors, plain: str, share: float, rank: int
) -> tuple[Tensor, Tensor, float]:
    """A `[rank, in]` and B `[out, rank]` of the mean of two changes B A, and how much of its squares they
    hold."""
    a = torch.cat([new[f"{plain}.lora_a"], old[f"{plain}.lora_a"]]).double()
    b = torch.cat([share * new[f"{plain}.lora_b"], (1 - share) * old[f"{plain}.lora_b"]], 1).double()
    left, b = torch.linalg.qr(b)
    right, a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(b @ a.T)
    root, power = s[:rank].sqrt(), s.square().sum().clamp(min=1e-300)
    first, second = (root[:, None] * v[:rank]) @ right.T, left @ (u[:, :rank] * root)
    return first.float(), second.float(), float(s[:rank].square().sum() / power)
