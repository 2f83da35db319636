"""Teachers: which Transformers can be converted, and how each is read.

A Llama, Qwen3 or MiniCPM model is a special case of our own: every layer softmax attention, rotary positions
kept, no output gate. So a teacher is loaded, tensor for tensor and under the same names, as a
`MiniCPMSALAForCausalLM` in that form, always dense. This needs no remote code (MiniCPM has no class in
transformers), and one class serves as teacher and student. It knows nothing of Lightning layers.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..hub import checkpoint_folder
from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.config import ROPE_SCALINGS, SPARSE

_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # OWNER/NAME, or a name alone
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "bos_token_id",
    "pad_token_id",
)


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """Scalings of a model that has none."""
    return {
        "scale_emb": 1,
        "scale_depth": math.sqrt(given["num_hidden_layers"]),
        "dim_model_base": given["hidden_size"],
    }


def _llama(given: dict[str, Any]) -> dict[str, Any]:
    _refuse(given, "mlp_bias", (False, None), "the feed-forward of MiniCPM-SALA has no bias")
    return {**_plain(given), "attn_qk_norm": False, "attention_bias": bool(given.get("attention_bias"))}


def _qwen3(given: dict[str, Any]) -> dict[str, Any]:
    _refuse(
        given,
        "use_sliding_window",
        (False, None),
        "kept layers see the whole past: a sliding window cannot be expressed",
    )
    return {**_plain(given), "attn_qk_norm": True, "attention_bias": bool(given.get("attention_bias"))}


def _minicpm(given: dict[str, Any]) -> dict[str, Any]:
    _refuse(given, "num_experts", (0, None), "mixtures of experts cannot be converted")
    scalings = {key: given.get(key, 1) for key in ("scale_emb", "scale_depth", "dim_model_base")}
    return {
        **scalings,
        "attn_qk_norm": False,
        "attention_bias": bool(given.get("attention_bias")),
        "tie_word_embeddings": given.get("tie_word_embeddings", True),
    }


FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "minicpm": _minicpm,
}


def _refuse(given: dict[str, Any], field: str, allowed: tuple[object, ...], why: str) -> None:
    if given.get(field) not in allowed:
        raise ValueError(f"teacher: {field} must be {allowed[0]!r}, got {given[field]!r}: {why}")


def teacher_config(given: dict[str, Any]) -> MiniCPMSALAConfig:
    """The configuration of a teacher in our form, from its `config.json` (with its family's defaults filled
    in).

    Raises:
        ValueError: a family that is not supported (naming those that are), quantised weights, or a field that
            cannot be expressed.
    """
    family = given.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"teacher: model_type must be one of {', '.join(map(repr, FAMILIES))}, got {family!r}; "
            "other families would need their own mapping of weights"
        )
    if given.get("quantization_config"):
        kind = given["quantization_config"].get("quant_method")
        raise ValueError(
            f"teacher: its weights are quantised ({kind}), which is not read: give the checkpoint that it "
            "was made from, or a GGUF file"
        )
    missing = [key for key in _SAME[:5] if given.get(key) is None]
    if missing:
        raise ValueError(f"teacher: its config.json lacks {', '.join(missing)}")
    values = {key: given[key] for key in _SAME if key in given}
    if values.get("pad_token_id") == -1:  # how the first Llama models say that there is none
        values["pad_token_id"] = None
    values |= {
        "num_key_value_heads": given.get("num_key_value_heads") or given["num_attention_heads"],
        "head_dim": given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
        "hidden_act": given.get("hidden_act", "silu"),
        "rms_norm_eps": given.get("rms_norm_eps", 1e-6),
        "initializer_range": given.get("initializer_range", 0.02),
        "tie_word_embeddings": bool(given.get("tie_word_embeddings", False)),
        "eos_token_id": given.get("eos_token_id"),
        "attn_use_rope": True,
        "attn_use_output_gate": False,
        "attention_mode": "dense",
        "mixer_types": [SPARSE] * given["num_hidden_layers"],
        "attention_dropout": 0.0,
    }
    return MiniCPMSALAConfig(**{**values, **_rope(given), **FAMILIES[family](given)})


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, from the keys of either generation of config.json."""
    rope = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", None) or given.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "longrope":
        return {"rope_theta": theta, **_static_longrope(rope, given)}
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"teacher: rope_scaling must be null, {' or '.join(ROPE_SCALINGS)}, got {kind!r}: it changes "
            "with the "
            "length, which the rotary positions of MiniCPM-SALA cannot"
        )
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": kind, **{key: rope[key] for key in ROPE_SCALINGS[kind] if key in rope}},
    }


def _static_longrope(rope: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """longrope whose factors do not depend on the length, as our configuration has it.

    MiniCPM4 publishes equal short and long factors and an original length equal to the maximum: then every
    frequency is divided by its factor and nothing else changes. Raises ValueError for any other.
    """
    short, long = rope.get("short_factor"), rope.get("long_factor")
    longest = given.get("max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    if not short or short != long or original != longest:
        raise ValueError(
            "teacher: rope_scaling 'longrope' must have equal short_factor and long_factor, and "
            f"original_max_position_embeddings equal to max_position_embeddings ({longest}), got "
            f"{'equal' if short and short == long else 'different'} factors and {original}: otherwise it "
            "changes with the length, which the rotary positions of MiniCPM-SALA cannot"
        )
    for key in ("attention_factor", "factor"):
        if rope.get(key) not in (None, 1):
            raise ValueError(f"teacher: rope_scaling.{key} must be 1, got {rope[key]!r}: it scales attention")
    keys = ROPE_SCALINGS["longrope"]
    return {"rope_scaling": {"rope_type": "longrope", **{key: {**given, **rope}[key] for key in keys}}}


def check_vocabulary(tokenizer: Any, config: MiniCPMSALAConfig, whose: str) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has rows for."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{whose}: the tokenizer has {len(tokenizer):,} tokens and the model's vocabulary "
            f"{config.vocab_size:,}: they are not of one model"
        )


def check_place(field: str, path: str | Path) -> None:
    """Raise ValueError for what is no folder here and cannot be the name of a checkpoint on the hub."""
    if not Path(path).exists() and not _HUB_NAME.fullmatch(str(path)):
        raise ValueError(f"{field}: there is no folder {path}")


def read_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a folder or hub name, with the defaults of its class where transformers has one.

    Raises ValueError for a folder without one, or that is not there.
    """
    path = checkpoint_folder(path)
    check_place("teacher", path)
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"teacher: {path} holds no config.json: give the folder or hub name of a checkpoint")
    try:
        given, _ = PreTrainedConfig.get_config_dict(str(path))
    except OSError as error:
        raise ValueError(
            f"teacher: {path} is neither a folder here nor a checkpoint that can be fetched ({error})"
        ) from error
    if given.get("model_type") in FAMILIES and given["model_type"] != "minicpm":
        given = AutoConfig.for_model(**given).to_dict() | {"model_type": given["model_type"]}
    return given


def load_teacher(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> MiniCPMSALAForCausalLM:
    """Load a Transformer as an always dense, frozen model of our class; strict, safetensors only.

    Args:
        path: folder or hub name of a checkpoint, name of a pulled model, or a GGUF file, which is unpacked
            once.

    Raises:
        ValueError: an unsupported family, a field that cannot be expressed, or tensors that do not fit.
    """
    path = checkpoint_folder(path)
    config = teacher_config(read_config(path))
    model = MiniCPMSALAForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)
