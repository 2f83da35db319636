"""Whether SGLang's native `MiniCPMSALAForCausalLM` serves a checkpoint, found out without SGLang.

Compared are the names and shapes of all tensors, the keys of config.json, and what its sparse attention asks
for, as its sources have them (sgl-project/sglang on GitHub: `models/minicpm.py`, `configs/minicpm.py` and
`layers/attention/minicpm/backend.py` in `srt`, read 2026-11-26). What its loader expects is written out here
from those sources, apart from our own model: a mistake in one would not be found with the other.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .checkpoint import check_files
from .config import LIGHTNING, SPARSE, MiniCPMSALAConfig

_QUERIES_PER_GROUP = 16  # of its sparse kernels, on each rank
_NAMED = 10  # tensors written out before "and n more"


@dataclass(frozen=True)
class Finding:
    """Something about a checkpoint that whoever serves it has to know.

    Attributes:
        refused: SGLang stops, or answers wrongly; else it serves the checkpoint, with a difference.
        text: what it is, and what to do.
    """

    refused: bool
    text: str


def check_sglang(path: str | Path, tensor_parallel: int = 1) -> list[Finding]:
    """What stands between a checkpoint and SGLang; empty if nothing does.

    Args:
        path: its folder.
        tensor_parallel: GPUs that share each layer (SGLang's --tp-size), over all nodes.

    Raises:
        ValueError: it is no checkpoint folder, its configuration is wrong, or `tensor_parallel` is below 1.
    """
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel must be at least 1, got {tensor_parallel}")
    folder = Path(path)
    check_files(folder)
    config = MiniCPMSALAConfig.from_pretrained(folder)
    given = json.loads((folder / "config.json").read_text())
    found = [*_config_findings(config, given), *_parallel_findings(config, tensor_parallel)]
    return [*found, *_tensor_findings(_shapes(folder), expected_tensors(config))]


def expected_tensors(config: MiniCPMSALAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that SGLang's loader takes, before it stacks and shards them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer, kind in enumerate(config.mixer_types or ()):
        mixer = _sparse_mixer(config) if kind == SPARSE else _lightning_mixer(config)
        parts = {f"self_attn.{name}": shape for name, shape in mixer.items()}
        parts |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
        parts |= {"mlp.down_proj.weight": (hidden, inner)}
        parts |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def _sparse_mixer(config: MiniCPMSALAConfig) -> dict[str, tuple[int, ...]]:
    hidden, size = config.hidden_size, config.head_dim or 0
    heads, groups = config.num_attention_heads * size, (config.num_key_value_heads or 0) * size
    rows = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    if config.attn_use_output_gate:
        rows["o_gate"] = heads
    biased = {*rows, "o_proj"} - {"o_gate"} if config.attention_bias else set()  # its gate never has one
    return _linears(rows, hidden, heads, biased)


def _lightning_mixer(config: MiniCPMSALAConfig) -> dict[str, tuple[int, ...]]:
    hidden, size = config.hidden_size, config.lightning_head_dim or 0
    heads, groups = (config.lightning_nh or 0) * size, (config.lightning_nkv or 0) * size
    rows = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    if config.use_output_gate:
        rows["z_proj"] = heads
    shapes = _linears(rows, hidden, heads, {*rows, "o_proj"} if config.attention_bias else set())
    if config.qk_norm:
        shapes |= {"q_norm.weight": (size,), "k_norm.weight": (size,)}
    return shapes | ({"o_norm.weight": (heads,)} if config.use_output_norm else {})


def _linears(
    rows: Mapping[str, int], hidden: int, heads: int, biased: set[str]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (count, hidden) for name, count in rows.items()}
    shapes["o_proj.weight"] = (hidden, heads)
    return shapes | {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased}


def _config_findings(config: MiniCPMSALAConfig, given: Mapping[str, Any]) -> Iterator[Finding]:
    sparse, lightning = (kind in (config.mixer_types or ()) for kind in (SPARSE, LIGHTNING))
    for field, wanted in (("architectures", ["MiniCPMSALAForCausalLM"]), ("model_type", "minicpm_sala")):
        if given.get(field) != wanted:
            yield Finding(True, f"{field} is {given.get(field)!r}, and SGLang finds its class by {wanted!r}")
    if config.hidden_act not in ("silu", "swish"):
        yield Finding(True, f"hidden_act is {config.hidden_act!r}, and SGLang has 'silu' only")
    elif config.hidden_act != "silu":
        yield Finding(True, "hidden_act is 'swish', which SGLang knows as 'silu': change config.json")
    if lightning and config.lightning_nh != config.lightning_nkv:
        yield Finding(
            True,
            f"lightning_nh is {config.lightning_nh} and lightning_nkv {config.lightning_nkv}: SGLang's "
            "Lightning kernels need them equal",
        )
    for field, what in (
        ("attn_qk_norm", "norms"),
        ("attn_scale_base", "a scale that grows with the position"),
    ):
        if sparse and getattr(config, field):
            yield Finding(True, f"{field} puts {what} into sparse layers, which SGLang does not have")
    if sparse:
        yield from _selection_findings(config)


def _selection_findings(config: MiniCPMSALAConfig) -> Iterator[Finding]:
    chosen = config.sparse_config
    assert chosen is not None, "filled by the configuration"
    if config.attention_mode == "sparse":
        yield Finding(False, "attention_mode is 'sparse': set SGLANG_MINICPM_DENSE_AS_SPARSE=1")
    if config.attention_mode == "dense":
        yield Finding(False, "attention_mode is 'dense': set SGLANG_MINICPM_FORCE_DENSE=1")
    if config.block_search != "exact":
        yield Finding(
            False, f"block_search {config.block_search!r} is not known there: every block is scored"
        )
    if chosen.get("lse", "coarse") != "coarse":
        yield Finding(False, "sparse_config.lse is 'exact', and SGLang's scores are those of 'coarse'")
    for name, by in (
        ("kernel_size", "kernel_stride"),
        ("block_size", "kernel_stride"),
        ("window_size", "block_size"),
    ):
        if chosen[name] % chosen[by]:
            yield Finding(True, f"sparse_config.{name} {chosen[name]} is no multiple of {by} {chosen[by]}")
    needed = max(chosen["dense_len"], chosen["block_size"] * config.block_spec.num_blocks)
    if config.max_position_embeddings < needed:
        yield Finding(
            True,
            f"max_position_embeddings is {config.max_position_embeddings}, and SGLang's sparse attention "
            f"needs a context of {needed} tokens",
        )


def _parallel_findings(config: MiniCPMSALAConfig, ranks: int) -> Iterator[Finding]:
    """Whether layers can be split over `ranks` GPUs, and whether its sparse kernels take what each gets."""
    parts = {"num_attention_heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
    if LIGHTNING in (config.mixer_types or ()):
        parts["lightning_nh"] = config.lightning_nh or 0
    for name, count in parts.items():
        if count % ranks:
            yield Finding(True, f"{name} {count} cannot be split over {ranks} GPUs")
    groups = config.num_key_value_heads or 0
    if groups % ranks and ranks % groups:
        yield Finding(True, f"num_key_value_heads {groups} can be neither split nor copied over {ranks} GPUs")
    if SPARSE not in (config.mixer_types or ()):
        return
    each = (config.num_attention_heads // ranks) // max(1, groups // ranks)
    if each != _QUERIES_PER_GROUP:
        most = config.num_attention_heads // _QUERIES_PER_GROUP
        advice = (
            f"use at most {most}, and more replicas"
            if config.num_attention_heads == _QUERIES_PER_GROUP * groups
            else "its dense attention (SGLANG_MINICPM_FORCE_DENSE=1) is what is left"
        )
        yield Finding(
            True,
            f"with {ranks} GPU{'s' * (ranks > 1)} a layer there are {each} query heads for each of keys and "
            f"values, and SGLang's sparse kernels need {_QUERIES_PER_GROUP}: {advice}",
        )


def _tensor_findings(
    there: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[Finding]:
    missing, surplus = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
    wrong = [
        f"{name} {list(there[name])} for {list(wanted[name])}"
        for name in sorted(wanted.keys() & there.keys())
        if there[name] != wanted[name]
    ]
    if missing:  # its loader does not look for what did not come
        yield Finding(True, f"tensors that SGLang would leave unset: {_listed(missing)}")
    if surplus:
        dropped = all(name.endswith(".bias") for name in surplus)
        what = "leaves out without a word" if dropped else "does not know"
        yield Finding(True, f"tensors that SGLang {what}: {_listed(surplus)}")
    if wrong:
        yield Finding(True, f"tensors of another shape: {_listed(wrong)}")


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes
