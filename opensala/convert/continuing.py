"""A conversion that goes on from what an earlier one left: more tokens, longer sequences, other texts.

It begins with the trained weights of an outcome (`outcome`) instead of an alignment; its own outcome is then
all that both changed. Optimizers start anew.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from .config import ConvertConfig
from .outcome import read_outcome

_FACTORS = (".lora_a", ".lora_b")


def continued(config: ConvertConfig) -> ConvertConfig:
    """The configuration with the structure of the hybrid that it goes on from, and no alignment; as it is
    without `start`.

    Raises:
        ValueError: a folder without an outcome, layers that are not the outcome's, or a run whose outcome
            would lose what the earlier one changed.
    """
    if config.start is None:
        return config
    record, tensors = read_outcome(Path(config.start))
    hybrid = MiniCPMSALAConfig(**record["config"])
    kept = tuple(i for i in range(hybrid.num_hidden_layers) if hybrid.is_sparse(i))
    if config.layers is not None and tuple(sorted(config.layers)) != kept:
        raise ValueError(
            f"start: {config.start} keeps layers {list(kept)}, this run {list(config.layers)}: "
            "leave --layers out"
        )
    if config.trainable == "linear":
        raise ValueError(
            f"start: {config.start} changed more than the converted layers: set trainable to lora or all"
        )
    ranks = [x.shape[0] for name, x in tensors.items() if name.endswith(".lora_a")]
    if config.trainable == "lora" and ranks and max(ranks) > config.lora_rank:
        raise ValueError(
            f"start: the low-rank changes of {config.start} have rank {max(ranks)}, lora_rank is "
            f"{config.lora_rank}: set it to {max(ranks)} or more"
        )
    return replace(
        config,
        layers=kept,
        hype=not hybrid.attn_use_rope,
        attn_qk_norm=hybrid.attn_qk_norm,
        attn_scale_base=hybrid.attn_scale_base,
        lightning_nkv=hybrid.lightning_nkv,
        align=replace(config.align, steps=0),
    )


@torch.no_grad()
def take_up(student: MiniCPMSALAForCausalLM, folder: str | Path) -> None:
    """Set the weights of a student, fresh from its teacher, to those of an outcome, in place.

    Low-rank changes go into the student's own where it has any (`lora.add_lora`, of the same rank or a
    higher one), else into the matrices.

    Raises:
        ValueError: a tensor that has no place in the student.
    """
    record, tensors = read_outcome(Path(folder))
    own, based = dict(student.named_parameters()), set(record["base"])
    for name, x in tensors.items():
        plain, dot, factor = name.rpartition(".")
        if f"{dot}{factor}" in _FACTORS:
            _take_factor(own, plain, factor, tensors, folder)
            continue
        target = own.get(name)
        if target is None or target.shape != x.shape:
            raise ValueError(f"start: {name} of {folder} has no place in a hybrid of this teacher")
        target.copy_(target + x.to(target) if name in based else x)


def _take_factor(
    own: dict[str, nn.Parameter],
    plain: str,
    factor: str,
    tensors: dict[str, Tensor],
    folder: str | Path,
) -> None:
    """Take one factor of the change of a matrix; with the first one, the whole change of a matrix that has no
    low-rank change here."""
    layer, x = plain.removesuffix(".weight"), tensors[f"{plain}.{factor}"]
    target, whole = own.get(f"{layer}.{factor}"), own.get(plain)
    if target is None and whole is not None:
        if factor == "lora_a":
            whole.add_((tensors[f"{plain}.lora_b"] @ x).to(whole))
        return
    if target is None:
        raise ValueError(f"start: {plain} of {folder} has no place in a hybrid of this teacher")
    if factor == "lora_a":
        target[: x.shape[0]] = x.to(target)
    else:
        target[:, : x.shape[1]] = x.to(target)
