"""The two token mixers of MiniCPM-SALA, from hidden states to hidden states.

Both take the layout of the call and, if there is one, their layer's part of the cache. They pack padding
away, run the ops on whole sequences, and unpack. Which tokens exist and which mode applies is the
layout's business; how an op runs is the ops' business.

Shapes: B rows, T tokens, H query heads, Hkv kv heads, D head dim.
"""

import math

import torch
from torch import Tensor, nn

from ..ops import alibi_slopes, lightning_attention, norm_gate, norm_rope, select_blocks, sparse_attention
from .cache import LightningCacheLayer, SALACache, SparseCacheLayer
from .config import MiniCPMSALAConfig
from .layers import RMSNorm
from .layout import SequenceLayout
from .replay import record_or_replay

_DENSE_TILE = 1 << 24  # mask elements of one tile of dense attention over a cache


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a float type is computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of the last T of L positions: q `[B, T, H, D]`, k, v `[B, L, Hkv, D]`."""
    tokens, length = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = nn.functional.scaled_dot_product_attention
    if tokens == length:
        return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    if tokens == 1:
        return attend(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)
    tile = max(64, _DENSE_TILE // length)
    column = torch.arange(length, device=q.device)
    parts = []
    for a in range(0, tokens, tile):
        b = min(a + tile, tokens)
        end = length - tokens + b
        row = torch.arange(length - tokens + a, end, device=q.device)
        mask = column[:end] <= row[:, None]
        parts.append(
            attend(q[:, :, a:b], k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale, enable_gqa=True)
        )
    return torch.cat(parts, 2).transpose(1, 2)


class SparseMixer(nn.Module):
    """InfLLM-V2 attention (`minicpm4`): block-sparse, or dense for a sequence the layout calls dense."""

    def __init__(self, config: MiniCPMSALAConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        assert config.head_dim is not None and config.num_key_value_heads is not None, (
            "filled by the configuration"
        )
        self.head_dim, hidden, bias = config.head_dim, config.hidden_size, config.attention_bias
        inner, kv_inner = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(hidden, inner, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_inner, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_inner, bias=bias)
        self.o_proj = nn.Linear(inner, hidden, bias=bias)
        if config.attn_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        if config.attn_use_output_gate:
            self.o_gate = nn.Linear(hidden, inner, bias=bias)
        self.scale = 1.0 / math.sqrt(self.head_dim)

    def project(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, H, D]`, k and v `[B, T, Hkv, D]` in x's dtype."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = layout.angles(self.head_dim, self.config) if self.config.attn_use_rope else (None, None)
        if self.config.attn_qk_norm or cos is not None:
            norms = (self.q_norm.weight, self.k_norm.weight) if self.config.attn_qk_norm else (None, None)
            q, k = (
                norm_rope(y, w, cos, sin, self.config.rms_norm_eps)
                for y, w in zip((q, k), norms, strict=True)
            )
        base = self.config.attn_scale_base
        if base is not None:  # on the query, so that the selection of blocks follows
            q = (
                q
                * (torch.log(layout.positions.double() + base) / math.log(base)).to(q.dtype)[..., None, None]
            )
        return q, k, v

    def forward(self, x: Tensor, layout: SequenceLayout, cache: SALACache | None) -> Tensor:
        q, k, v = (layout.pack(y) for y in self.project(x, layout))
        if cache is None and layout.rectangular and layout.parallel is None and not layout.sparse[0]:
            o = dense_attention(q, k, v, self.scale)
        else:
            pieces = zip(layout.split(q), layout.split_whole(k, v), strict=True)
            rows = [self._one(n, piece, *keys, layout, cache) for n, (piece, keys) in enumerate(pieces)]
            o = torch.cat(rows, 0 if layout.rectangular else 1)
        o = layout.unpack(o).flatten(2)
        if self.config.attn_use_output_gate:
            o = norm_gate(o, None, self.o_gate(x), self.config.rms_norm_eps)
        return self.o_proj(o)

    def _one(
        self, n: int, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, cache: SALACache | None
    ) -> Tensor:
        """Sequence n of the call: q `[1, T, H, D]`, k, v from all tokens that are not in a cache -> `[1, T,
        H, D]`."""
        if q.shape[1] == 0:
            return q
        compressed = None
        if cache is not None:
            entry = cache.layers[self.layer]
            assert isinstance(entry, SparseCacheLayer), "the cache is built from the same configuration"
            k, v, *levels = entry.append(n, len(layout.past), layout.past[n], k, v, cache.reserve)
            compressed = (levels[0], levels[1])
        if not layout.sparse[n]:
            return dense_attention(q, k, v, self.scale)
        spec = self.config.block_spec
        blocks = record_or_replay(
            lambda: select_blocks(
                q,
                k,
                spec,
                compressed=compressed,
                scale=self.scale,
                lse=self.config.lse,
                search=self.config.block_search,
            )
        )
        return sparse_attention(q, k, v, blocks, spec.block_size, scale=self.scale)


class LightningMixer(nn.Module):
    """Lightning attention (`lightning-attn`): QK-norm, RoPE, constant decay, output norm and gate."""

    def __init__(self, config: MiniCPMSALAConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        assert config.lightning_head_dim and config.lightning_nh and config.lightning_nkv, (
            "filled by the configuration"
        )
        self.head_dim, self.heads = config.lightning_head_dim, config.lightning_nh
        self.repeats = config.lightning_nh // config.lightning_nkv
        hidden, bias = config.hidden_size, config.attention_bias
        inner, kv_inner = self.heads * self.head_dim, config.lightning_nkv * self.head_dim
        self.q_proj = nn.Linear(hidden, inner, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_inner, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_inner, bias=bias)
        self.o_proj = nn.Linear(inner, hidden, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        if config.use_output_norm:
            self.o_norm = RMSNorm(inner, config.rms_norm_eps)
        if config.use_output_gate:
            self.z_proj = nn.Linear(hidden, inner, bias=bias)
        self.slopes = alibi_slopes(self.heads)

    def project(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, T, H, D]`, normalised, rotated and repeated to the query heads."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (
            layout.angles(self.head_dim, self.config) if self.config.lightning_use_rope else (None, None)
        )
        if self.config.qk_norm or cos is not None:
            norms = (self.q_norm.weight, self.k_norm.weight) if self.config.qk_norm else (None, None)
            # Left in float32: rounding q and k behind the rotation costs accuracy on long contexts.
            q, k = (
                norm_rope(y, w, cos, sin, self.config.rms_norm_eps, out_dtype=wide(y.dtype))
                for y, w in zip((q, k), norms, strict=True)
            )
        if self.repeats > 1:
            k, v = (y.repeat_interleave(self.repeats, dim=2) for y in (k, v))
        return q, k, v

    def forward(self, x: Tensor, layout: SequenceLayout, cache: SALACache | None) -> Tensor:
        q, k, v = (layout.pack(y) for y in self.project(x, layout))
        entry = None if cache is None else cache.layers[self.layer]
        assert entry is None or isinstance(entry, LightningCacheLayer), (
            "the cache is built from the same configuration"
        )
        decay = torch.tensor(self.slopes, dtype=torch.float32, device=x.device)
        before = None if entry is None else entry.state
        if layout.parallel is not None:
            before = layout.parallel.state_before(k, v, self.slopes, layout)
        o, state = self._run(q, k, v, decay, layout, before)
        if entry is not None and cache is not None:
            recorded = (k, v) if cache.record_past and layout.rectangular else (None, None)
            entry.stage(state, *recorded)
        o = layout.unpack(o).flatten(2)
        weight = self.o_norm.weight if self.config.use_output_norm else None
        gate = self.z_proj(x) if self.config.use_output_gate else None
        if weight is not None or gate is not None:
            o = norm_gate(o, weight, gate, self.config.rms_norm_eps)
        return self.o_proj(o)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, layout: SequenceLayout, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scale = self.config.lightning_scale_value
        if layout.rectangular:
            return lightning_attention(q, k, v, decay, scale=scale, initial_state=state)
        present = [n for n, length in enumerate(layout.lengths) if length]
        if len(present) == len(layout.lengths):
            return lightning_attention(
                q, k, v, decay, scale=scale, initial_state=state, cu_seqlens=layout.cu_seqlens
            )
        # A row that is all padding in this call keeps its state.
        rows = torch.tensor(present, device=q.device)
        whole = q.new_zeros(
            len(layout.lengths), self.heads, self.head_dim, self.head_dim, dtype=torch.float32
        )
        whole = whole if state is None else state
        if not present:
            return v, whole
        bounds = torch.tensor([0, *(layout.lengths[n] for n in present)], device=q.device).cumsum(0)
        o, new = lightning_attention(
            q, k, v, decay, scale=scale, initial_state=whole[rows], cu_seqlens=bounds
        )
        return o, whole.index_copy(0, rows, new)
