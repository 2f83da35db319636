"""What is looked at before a conversion begins, so that it is refused now and not after hours."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..hub import checkpoint_folder
from ..model import MiniCPMSALAConfig
from ..model.flops import all_parameters
from ..runs import read_json
from .config import ConvertConfig
from .ranks import Ranks
from .selection import default_keep, select_layers
from .transfer import student_config


def device_of(name: str, ranks: Ranks) -> torch.device:
    """The device of a configuration, this rank's own where there are several.

    Raises ValueError for one that is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no GPU here; use cpu")
    if ranks.world == 1 or ranks.mesh is None:
        return device
    if device.index is not None:
        raise ValueError(f"device {name!r}: each of {ranks.world} processes takes its own GPU; use cuda")
    return ranks.mesh.device


def tokenizer_of(path: str) -> Any:
    """The tokenizer beside a teacher; ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint_folder(path))
    except OSError as error:
        raise ValueError(
            f"teacher: {path} has no tokenizer that can be read ({error}); save one beside the model"
        ) from error


def check_texts(config: ConvertConfig, texts: str, run: Path) -> None:
    """Raise ValueError if a run began with other texts: its data order would be another one from here on.

    Args:
        texts: fingerprint of those there are now.
    """
    known = read_json(run / "config.json")
    if known is not None and known.get("texts") != texts:
        cause = (
            "files were changed" if config.data else "packages or Python were installed, removed or updated"
        )
        raise ValueError(
            f"data: the texts are not those that {run} began with ({cause} since): bring them back, "
            "or begin a new run"
        )


def number_kept(config: ConvertConfig, layers: int) -> int:
    """How many of a teacher's layers stay softmax attention; ValueError for what cannot be."""
    if config.layers is not None:
        outside = [i for i in config.layers if not 0 <= i < layers]
        if outside or len(set(config.layers)) != len(config.layers):
            raise ValueError(
                f"layers must be different numbers in 0..{layers - 1}, got {list(config.layers)}"
            )
        return len(config.layers)
    keep = default_keep(layers, config.fix_ends) if config.keep is None else config.keep
    select_layers(
        None, keep, layers=layers, fix_ends=config.fix_ends, rule="uniform"
    )  # refuses what cannot be kept
    return keep


_RATES = ((3.5e9, 1e-4), (7e9, 5e-5), (math.inf, 3e-5))  # published for 2B, 5B and 9B (arXiv 2601.22156)


def published_rate(teacher: MiniCPMSALAConfig) -> float:
    """The peak rate of HALO's distillation for a teacher of this size; between the published sizes, that of
    the nearer one."""
    return next(rate for most, rate in _RATES if all_parameters(teacher) < most)


def configured(config: ConvertConfig, teacher: MiniCPMSALAConfig, kept: list[int]) -> MiniCPMSALAConfig:
    """The configuration of the hybrid with these layers kept."""
    return student_config(
        teacher,
        kept,
        hype=config.hype,
        attn_qk_norm=config.attn_qk_norm,
        attn_scale_base=config.attn_scale_base,
        sparse_config=config.sparse_config,
        lightning_nkv=config.lightning_nkv,
    )


def check_ranks(config: ConvertConfig, compute: str, ranks: Ranks) -> None:
    """Raise ValueError for what several processes cannot do."""
    if ranks.world > 1 and config.dtype != "float32" and compute == "float32":
        raise ValueError(
            f"compute: a teacher in {config.dtype} on {ranks.world} processes is computed in bfloat16; set "
            "compute to bfloat16, or dtype to float32"
        )
