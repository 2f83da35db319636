"""What each field of the configuration may hold, one rule a field: a kind and a range.

A rule takes a field's name and its value and raises ValueError in one line. Relations between fields are not
looked at here: those are in `config`. The upper ends of the ranges are far above any model that was ever
made; they are there so that a slip of the keyboard is refused by name instead of by the allocator.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Rule = Callable[[str, Any], None]
DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")
SCALE_NAMES = ("1/sqrt(d)", "1/d")


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError naming the field, the value, what is allowed and the nearest allowed spelling."""
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{field} must be one of {', '.join(map(repr, allowed))}, got {_shown(value)}.{hint}"
        )


def whole(least: int, most: int) -> Rule:
    """A rule: an integer from `least` to `most`."""

    def rule(field: str, value: Any) -> None:
        if not _is_whole(value) or value < least:
            raise ValueError(f"{field} must be a whole number of at least {least}, got {_shown(value)}")
        if value > most:
            raise ValueError(f"{field} must be a whole number of at most {most:,}, got {_shown(value)}")

    return rule


def number(least: float, most: float) -> Rule:
    """A rule: a finite number from `least` to `most`."""

    def rule(field: str, value: Any) -> None:
        if not _is_number(value) or not least <= value <= most:
            raise ValueError(f"{field} must be a number from {least:g} to {most:g}, got {_shown(value)}")

    return rule


def optional(inner: Rule) -> Rule:
    """The same rule, with null allowed."""
    return lambda field, value: None if value is None else inner(field, value)


def choice(*allowed: str) -> Rule:
    return lambda field, value: check_choice(field, value, allowed)


def flag(field: str, value: Any) -> None:
    """A rule: true or false, not a string or a number that looks like one."""
    if not isinstance(value, bool):
        raise ValueError(f"{field} must be true or false, got {_shown(value)}")


def names(field: str, value: Any) -> None:
    """A rule: a list of strings."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{field} must be a list of names, got {_shown(value)}")


def numbers(field: str, value: Any) -> None:
    """A rule: a list of positive numbers."""
    if not isinstance(value, (list, tuple)) or not all(_is_number(one) and one > 0 for one in value):
        raise ValueError(f"{field} must be a list of numbers above 0, got {_shown(value)}")


def mapping(field: str, value: Any) -> None:
    """A rule: an object of JSON."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} must be null or an object of names and values, got {_shown(value)}")


def no_dropout(field: str, value: Any) -> None:
    """A rule: the number 0."""
    if not _is_number(value) or value != 0:
        raise ValueError(f"{field} must be 0 (the released model has none), got {_shown(value)}")


def token_ids(field: str, value: Any) -> None:
    """A rule: a token id, or a list of some."""
    ids = value if isinstance(value, (list, tuple)) and value else [value]
    if not all(_is_whole(id) and id >= 0 for id in ids):
        raise ValueError(f"{field} must be a token id of 0 or more, or a list of them, got {_shown(value)}")


def output_scale(field: str, value: Any) -> None:
    """A rule: what `lightning_scale` may be."""
    if value in SCALE_NAMES if isinstance(value, str) else _is_number(value) and 1e-6 <= value <= 1e6:
        return
    raise ValueError(
        f"{field} must be '1/sqrt(d)', '1/d' or a number from 1e-06 to 1e+06, got {_shown(value)}"
    )


def length_scale(field: str, value: Any) -> None:
    """A rule: what `attn_scale_base` may be."""
    if value is not None and not (_is_number(value) and 1 < value <= 1e12):
        raise ValueError(f"{field} must be null or a number above 1, at most 1e+12, got {_shown(value)}")


def element_type(field: str, value: Any) -> None:
    """A rule: a floating point type of torch, or its name."""
    name = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else value
    if name is not None:
        check_choice(field, name, DTYPES)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    """A value in an error message, however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_COUNT = whole(1, 4096)
_FLAGS = (
    "lightning_use_rope",
    "attn_use_rope",
    "attn_use_output_gate",
    "attn_qk_norm",
    "use_output_gate",
    "use_output_norm",
    "qk_norm",
    "attention_bias",
    "tie_word_embeddings",
    "use_cache",
)
RULES: dict[str, Rule] = {
    "vocab_size": whole(1, 2**22),
    "hidden_size": whole(1, 2**17),
    "intermediate_size": whole(1, 2**20),
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": optional(_COUNT),
    "head_dim": optional(_COUNT),
    "lightning_nh": optional(_COUNT),
    "lightning_nkv": optional(_COUNT),
    "lightning_head_dim": optional(_COUNT),
    "max_position_embeddings": whole(1, 2**40),
    "hidden_act": choice(*ACTIVATIONS),
    "mixer_types": optional(names),
    "lightning_scale": output_scale,
    "attn_scale_base": length_scale,
    "attention_dropout": no_dropout,
    "rms_norm_eps": number(1e-30, 1),  # below, float32 rounds it to 0, and a row of zeros becomes NaN
    "rope_theta": number(1, 1e15),
    "rope_scaling": optional(mapping),
    "initializer_range": number(0, 100),
    "scale_emb": number(1e-6, 1e6),
    "scale_depth": number(1e-6, 1e6),
    "dim_model_base": number(1e-6, 1e9),
    "mup_denominator": number(1e-6, 1e9),
    "sparse_config": optional(mapping),
    "pad_token_id": optional(token_ids),
    "bos_token_id": optional(token_ids),
    "eos_token_id": optional(token_ids),
    "dtype": element_type,
    **dict.fromkeys(_FLAGS, flag),
}
SPARSE_RULES: dict[str, Rule] = {
    "kernel_size": whole(1, 65536),
    "kernel_stride": whole(1, 65536),
    "init_blocks": whole(0, 65536),
    "block_size": whole(1, 65536),
    "window_size": whole(0, 2**24),
    "topk": whole(1, 65536),
    "use_nope": flag,
    "dense_len": whole(0, 2**40),
}
