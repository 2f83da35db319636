"""Qwen3-8B's shape with random weights reading a prompt: what full attention costs, in pieces that fit.

Attention is one call a layer over the whole sequence (torch's fastest kernel for it); everything that works
token by token goes through in pieces, so that 256K tokens fit beside weights and cache on an 80 GB card.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from .. import baselines
from ..timing import quantiles
from ..twin import QWEN3_8B, build_dense, twin_config
from .steps import Context, Step

NAME = "Qwen3 8B shape"
PIECE = 8192  # tokens


def steps(prompts: tuple[int, ...]) -> list[Step]:
    return [
        Step(f"dense model, {n} tokens", "dense", 8 + 45 * (n / (256 << 10)) ** 2, _read(n)) for n in prompts
    ]


def model_of(context: Context) -> Qwen3ForCausalLM:
    """The dense model, in place of whatever was kept: both do not fit beside a long prompt."""
    if "dense" not in context.kept:
        context.kept.clear()
        context.device.release()
        config = QWEN3_8B if not context.sizes.model else twin_config(context.sizes.config())
        model = build_dense(config, device=context.device.torch, dtype=context.device.dtype)
        context.kept["dense"] = model.requires_grad_(False)
    return context.kept["dense"]


def _read(tokens: int) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        model, device = model_of(context), context.device
        ids = torch.randint(3, model.config.vocab_size, (1, tokens), device=device.torch)
        prefill_in_pieces(model, ids[:, : min(tokens, 2 * PIECE)])  # warm-up
        device.release()
        device.start_peak()
        device.synchronize()
        start = time.perf_counter()
        prefill_in_pieces(model, ids)
        device.synchronize()
        timing = quantiles([time.perf_counter() - start])
        peak = device.peak_bytes()
        context.report.add("first token", NAME, timing, shape=f"T={tokens}", dtype=device.dtype, peak=peak)

    return run


@torch.inference_mode()
def prefill_in_pieces(model: Qwen3ForCausalLM, ids: Tensor, piece: int = PIECE) -> Tensor:
    """Logits `[1, V]` of the last token of ids `[1, T]`; keys and values of all layers are kept until the
    end, as a cache would keep them."""
    inner, tokens = model.model, ids.shape[1]
    x = inner.embed_tokens(ids)
    parts = [slice(a, min(a + piece, tokens)) for a in range(0, tokens, piece)]
    positions = torch.arange(tokens, device=ids.device)[None]
    cos, sin = inner.rotary_emb(x[:, :1], positions)
    cache = []
    for layer in inner.layers:
        q, k, v = _heads(layer, x, cos, sin, parts)
        cache.append((k, v))
        o = _attend(q, k, v)
        del q
        for part in parts:
            row = x[:, part]
            row += layer.self_attn.o_proj(o[:, part].flatten(2))
            row += layer.mlp(layer.post_attention_layernorm(row))
        del o
    return model.lm_head(inner.norm(x[:, -1]))


def _heads(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, parts: list[slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[1, T, Hq, D]`, k and v `[1, T, Hkv, D]` of a layer, normalised and rotated."""
    mixer = layer.self_attn
    whole: list[Tensor] = []
    for part in parts:
        h = layer.input_layernorm(x[:, part])
        q, k, v = (
            p(h).unflatten(-1, (-1, mixer.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        q, k = apply_rotary_pos_emb(
            mixer.q_norm(q), mixer.k_norm(k), cos[:, part], sin[:, part], unsqueeze_dim=2
        )
        if not whole:
            whole = [y.new_empty(1, x.shape[1], *y.shape[2:]) for y in (q, k, v)]
        for target, y in zip(whole, (q, k, v), strict=True):
            target[:, part] = y
    return whole[0], whole[1], whole[2]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the first fast kernel that takes these tensors: cuDNN's, flash attention."""
    for kind in ("cudnn", "flash"):
        try:
            return baselines.dense_attention(q, k, v, kind).transpose(1, 2)
        except RuntimeError:
            continue
    return baselines.dense_attention(q, k, v).transpose(1, 2)
