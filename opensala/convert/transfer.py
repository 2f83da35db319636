"""Teacher weights -> hybrid weights, tensor for tensor, strict both ways.

A kept layer is the teacher's attention with a new output gate of zeros: sigmoid(0) = 1/2, and the output
projection is doubled, both exact in binary, so it starts by computing what the teacher computed. A converted
layer copies the projections (k and v repeated, so that each Lightning head has its own) and starts its gate
in the same way. The teacher is one loaded by `load_teacher`.

Shapes: H query heads, Hkv kv heads, D head dim, C hidden size.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.attention import LightningMixer
from ..model.config import LIGHTNING, SPARSE
from ..parallel import whole_state

GATE_AT_ZERO = 2.0  # 1 / sigmoid(0)
State = dict[str, Tensor]


def student_config(
    teacher: MiniCPMSALAConfig,
    kept: Iterable[int],
    *,
    hype: bool = True,
    attn_qk_norm: bool = False,
    attn_scale_base: float | None = None,
    sparse_config: Mapping[str, Any] | None = None,
    lightning_nkv: int | None = None,
) -> MiniCPMSALAConfig:
    """The hybrid's configuration.

    Args:
        teacher: as made by `teacher_config`.
        kept: layers that stay softmax attention.
        hype: take the rotary positions out of the kept layers.
        attn_qk_norm: add QK-norm to kept layers of a teacher without (one that has it keeps it).
        attn_scale_base: see `MiniCPMSALAConfig`.
        sparse_config: changes to the released block selection.
        lightning_nkv: k and v heads of the Lightning layers, from the teacher's number (each then serves a
            group of query heads, and k and v keep the teacher's size) to the number of query heads, which is
            the released form and the choice if None.
    """
    layers, chosen = teacher.num_hidden_layers, set(kept)
    groups = teacher.num_attention_heads if lightning_nkv is None else lightning_nkv
    own = teacher.num_key_value_heads
    assert own, "filled by the configuration"
    if groups < own or groups % own or teacher.num_attention_heads % groups:
        allowed = [
            n for n in range(own, teacher.num_attention_heads + 1, own) if not teacher.num_attention_heads % n
        ]
        raise ValueError(
            f"lightning_nkv must be a multiple of the teacher's {own} kv heads that divides its "
            f"{teacher.num_attention_heads} query heads, one of {', '.join(map(str, allowed))}, got {groups}"
        )
    outside = sorted(i for i in chosen if not 0 <= i < layers)
    if outside:
        raise ValueError(f"kept layers must lie in 0..{layers - 1}, got {outside}")
    values = {
        key: value for key, value in teacher.to_dict().items() if key in MiniCPMSALAConfig.__annotations__
    }
    return MiniCPMSALAConfig(
        **values
        | {
            "mixer_types": [SPARSE if i in chosen else LIGHTNING for i in range(layers)],
            "lightning_nh": teacher.num_attention_heads,
            "lightning_nkv": groups,
            "lightning_head_dim": teacher.head_dim,
            "qk_norm": True,
            "use_output_norm": True,
            "use_output_gate": True,
            "lightning_use_rope": True,
            "attn_use_rope": not hype,
            "attn_use_output_gate": True,
            "attn_qk_norm": teacher.attn_qk_norm or attn_qk_norm,
            "attn_scale_base": attn_scale_base,
            "sparse_config": dict(sparse_config or {}),
            "attention_mode": "auto",
        }
    )


def repeat_heads(weight: Tensor, head_dim: int, repeats: int) -> Tensor:
    """Rows of Hkv heads, `[Hkv * D, ...]` -> `[H * D, ...]`: each head `repeats` times in a row, as GQA
    shares them."""
    return weight.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, 0).flatten(0, 1)


def _take(source: State, names: Iterable[str]) -> State:
    return {name: source.pop(name) for name in names if name in source}


def kept_attention(attention: State, config: MiniCPMSALAConfig) -> State:
    """A teacher's attention weights (without prefix; emptied) -> those of a gated softmax layer."""
    taken = _take(
        attention,
        [f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
        + ["q_norm.weight", "k_norm.weight"],
    )
    taken |= _output(attention, "o_gate", taken["q_proj.weight"])
    if config.attn_qk_norm:
        _add_norms(taken, config.head_dim)
    return taken


def linear_attention(attention: State, config: MiniCPMSALAConfig) -> State:
    """A teacher's attention weights (without prefix; emptied) -> those of a Lightning layer before
    alignment."""
    assert config.head_dim and config.num_key_value_heads, "filled by the configuration"
    taken = _take(attention, ["q_proj.weight", "q_proj.bias", "q_norm.weight", "k_norm.weight"])
    assert config.lightning_nkv, "filled by the configuration"
    repeats = config.lightning_nkv // config.num_key_value_heads
    for name, weight in _take(
        attention, [f"{p}_proj.{kind}" for p in "kv" for kind in ("weight", "bias")]
    ).items():
        taken[name] = repeat_heads(weight, config.head_dim, repeats)
    taken |= _output(attention, "z_proj", taken["q_proj.weight"])
    taken["o_norm.weight"] = taken["q_proj.weight"].new_ones(config.num_attention_heads * config.head_dim)
    _add_norms(taken, config.head_dim)
    return taken


def _output(attention: State, gate: str, like: Tensor) -> State:
    """The output projection, doubled to undo a gate of zeros, and that gate (`like` has the gate's shape)."""
    taken = {
        "o_proj.weight": attention.pop("o_proj.weight") * GATE_AT_ZERO,
        f"{gate}.weight": torch.zeros_like(like),
    }
    if "o_proj.bias" in attention:  # added behind the gate: stays as it is
        taken |= {"o_proj.bias": attention.pop("o_proj.bias"), f"{gate}.bias": like.new_zeros(like.shape[0])}
    return taken


def _add_norms(state: State, head_dim: int | None) -> None:
    assert head_dim, "filled by the configuration"
    for name in ("q_norm.weight", "k_norm.weight"):
        state.setdefault(name, state["q_proj.weight"].new_ones(head_dim))


def split_layer(state: State, layer: int) -> State:
    """Take the mixer weights of a layer out of a model's weights, without their prefix."""
    prefix = f"model.layers.{layer}.self_attn."
    return {name.removeprefix(prefix): state.pop(name) for name in [n for n in state if n.startswith(prefix)]}


def hybrid_state(
    teacher: MiniCPMSALAForCausalLM, config: MiniCPMSALAConfig, mixers: Mapping[int, nn.Module] | None = None
) -> State:
    """All weights of the hybrid; converted layers from `mixers` where given, else as transferred.

    Raises:
        ValueError: a teacher tensor that has no place in the hybrid.
    """
    left: State = whole_state(teacher)
    result: State = {}
    for i in range(config.num_hidden_layers):
        attention = split_layer(left, i)
        if config.is_sparse(i):
            new = kept_attention(attention, config)
        elif mixers is not None:
            new = whole_state(mixers[i])
            attention = {}
        else:
            new = linear_attention(attention, config)
        if attention:
            raise ValueError(f"layer {i}: the hybrid has no place for {', '.join(sorted(attention))}")
        result |= {f"model.layers.{i}.self_attn.{name}": value for name, value in new.items()}
    return result | left


def assemble(
    teacher: MiniCPMSALAForCausalLM,
    config: MiniCPMSALAConfig,
    mixers: Mapping[int, nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> MiniCPMSALAForCausalLM:
    """Build the hybrid of a teacher, with weights of its own: whole ones, on the CPU, where the teacher's are
    sharded (all ranks must call it), else on the teacher's device.

    Args:
        teacher: as `load_teacher` gives it, sharded or not.
        config: as `student_config` gives it.
        mixers: aligned Lightning mixers by layer; None takes the transferred weights.
        dtype: of the hybrid; the teacher's if None.

    Raises:
        ValueError: a tensor that is missing or has no place, by name.
    """
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config)
    state = {
        name: value.to(dtype or teacher.dtype, copy=True)
        for name, value in hybrid_state(teacher, config, mixers).items()
    }
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the teacher's weights do not make the hybrid: {error}") from error
    model.tie_weights()
    return model if isinstance(teacher, FSDPModule) else model.to(teacher.device)


def lightning_mixers(teacher: MiniCPMSALAForCausalLM, lightning_nkv: int | None = None) -> nn.ModuleList:
    """One float32 Lightning mixer for every layer of the teacher, with the transferred weights.

    `lightning_nkv` as in `student_config`.
    """
    config = student_config(teacher.config, (), lightning_nkv=lightning_nkv)
    state = {name: value.detach() for name, value in teacher.state_dict().items()}
    mixers = nn.ModuleList()
    for i in range(config.num_hidden_layers):
        with torch.device("meta"):
            mixer = LightningMixer(config, i)
        weights = linear_attention(split_layer(state, i), config)
        mixer.load_state_dict(
            {name: value.to(torch.float32, copy=True) for name, value in weights.items()},
            strict=True,
            assign=True,
        )
        mixers.append(mixer.to(teacher.device))
    return mixers.requires_grad_(True)
