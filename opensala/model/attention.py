"""The two token mixers of MiniCPM-SALA, from hidden states to hidden states.

Each has two ways. Given a `SequenceLayout` it computes whole sequences with gradients and without a cache
(training, conversion). Given a `ForwardBatch` it computes the next tokens of sequences that live in pages and
slots (inference):
one call for all sequences, each in its own mode. Which tokens exist and which mode applies is the business of
layout and batch; how an op runs is that of the ops.

Shapes: B rows, T tokens, H query heads, Hkv kv heads, D head dim, W hidden size.
"""

import math

import torch
from torch import Tensor, nn

from ..ops import (
    alibi_slopes,
    dense_attention,
    lightning_attention,
    lightning_attention_slots,
    norm_gate,
    norm_rope,
    paged_attention,
    select_blocks,
    select_blocks_paged,
    sparse_attention,
    store_kv,
)
from .batch import ForwardBatch
from .config import MiniCPMSALAConfig
from .layers import Linear, RMSNorm
from .layout import SequenceLayout
from .replay import record_or_replay


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a float type is computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_growth(positions: Tensor, base: float) -> Tensor:
    """log(t + a) / log(a) in float64: the factor that `attn_scale_base` a puts on queries at positions t."""
    return torch.log(positions.double() + base) / math.log(base)


class SparseMixer(nn.Module):
    """InfLLM-V2 attention (`minicpm4`): block-sparse, or dense for a sequence that is called dense."""

    def __init__(self, config: MiniCPMSALAConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        assert config.head_dim is not None and config.num_key_value_heads is not None, (
            "filled by the configuration"
        )
        self.head_dim, hidden, bias = config.head_dim, config.hidden_size, config.attention_bias
        inner = config.num_attention_heads * self.head_dim
        kv_inner = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(hidden, inner, bias=bias)
        self.k_proj = Linear(hidden, kv_inner, bias=bias)
        self.v_proj = Linear(hidden, kv_inner, bias=bias)
        self.o_proj = Linear(inner, hidden, bias=bias)
        if config.attn_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        if config.attn_use_output_gate:
            self.o_gate = Linear(hidden, inner, bias=bias)
        self.scale = 1.0 / math.sqrt(self.head_dim)
        self.spec = config.block_spec
        self.rope_share: float | None = None  # while rotary positions fade out in training: what is left

    def project(self, x: Tensor, layout: SequenceLayout | ForwardBatch) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, H, D]`, k and v `[B, T, Hkv, D]` in x's dtype, from x `[B, T, W]`."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = layout.angles(self.head_dim, self.config) if self.config.attn_use_rope else (None, None)
        if self.rope_share and isinstance(layout, SequenceLayout):
            cos, sin = layout.angles(self.head_dim, self.config, self.rope_share)
        if self.config.attn_qk_norm or cos is not None:
            norms = (self.q_norm.weight, self.k_norm.weight) if self.config.attn_qk_norm else (None, None)
            q, k = (
                norm_rope(y, w, cos, sin, self.config.rms_norm_eps)
                for y, w in zip((q, k), norms, strict=True)
            )
        return self.scaled(q, layout.positions), k, v

    def scaled(self, q: Tensor, positions: Tensor) -> Tensor:
        """Queries `[B, T, H, D]` at positions `[B, T]` (or `[T]`), with `attn_scale_base` if there is one."""
        base = self.config.attn_scale_base
        if base is None:
            return q
        growth = log_growth(positions, base)
        return q * growth.to(q.dtype)[..., None, None]  # so that the selection of blocks follows

    def forward(self, x: Tensor, context: SequenceLayout | ForwardBatch) -> Tensor:
        attend = self._paged if isinstance(context, ForwardBatch) else self._whole
        o = attend(x, context).flatten(-2)  # type: ignore[arg-type]  # chosen by the type of context
        if self.config.attn_use_output_gate:
            o = norm_gate(o, None, self.o_gate(x), self.config.rms_norm_eps)
        return self.o_proj(o)

    def _paged(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Next tokens x `[1, T, W]` of the batch's sequences: `[1, T, H, D]`."""
        q, k, v = self.project(x, batch)
        return self.attend_pages(q[0], k[0], v[0], batch)[None]

    def attend_pages(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> Tensor:
        """The batch's next tokens, q `[T, H, D]`, k and v `[T, Hkv, D]`, into and over pages: `[T, H, D]`."""
        pool, tiers, blocks = batch.storage.kv[self.layer], batch.storage.backing, None
        # Attention rounds what the projections beside it round.
        least = getattr(self.q_proj, "half_rows", None)
        half = least is not None and len(q) >= least
        if tiers is None:
            store_kv(k, v, pool, batch.table, self.spec)
        else:
            tiers.store(
                self.layer,
                batch.table,
                lambda some, to, table: store_kv(k[some], v[some], to, table, self.spec),
            )
        if batch.any_sparse:
            blocks = select_blocks_paged(
                q,
                pool,
                batch.table,
                self.spec,
                scale=self.scale,
                lse=self.config.lse,
                search=self.config.block_search,
                half_products=half,
            )
            if batch.chosen is not None:
                batch.chosen[self.layer] = blocks
        if tiers is None:
            return paged_attention(
                q, pool, batch.table, blocks, self.spec, scale=self.scale, half_products=half
            )
        parts = [
            paged_attention(
                q[some],
                at,
                table,
                None if blocks is None else blocks[some],
                self.spec,
                scale=self.scale,
                half_products=half,
            )
            for some, at, table in tiers.pieces(self.layer, batch.table, blocks)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _whole(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """All tokens x `[B, T, W]` of whole sequences: `[B, T, H, D]`."""
        q, k, v = (layout.pack(y) for y in self.project(x, layout))
        if layout.rectangular and layout.parallel is None and not layout.sparse[0]:
            return dense_attention(q, k, v, self.scale)
        pieces = zip(layout.split(q), layout.split_whole(k, v), strict=True)
        rows = [self._one(layout.sparse[n], piece, *keys) for n, (piece, keys) in enumerate(pieces)]
        return layout.unpack(torch.cat(rows, 0 if layout.rectangular else 1))

    def _one(self, sparse: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence: q `[1, T, H, D]`, k and v `[1, L, Hkv, D]` -> `[1, T, H, D]`."""
        if q.shape[1] == 0:
            return q
        if not sparse:
            return dense_attention(q, k, v, self.scale)
        spec, config = self.spec, self.config
        blocks = record_or_replay(
            lambda: select_blocks(q, k, spec, scale=self.scale, lse=config.lse, search=config.block_search)
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
        self.q_proj = Linear(hidden, inner, bias=bias)
        self.k_proj = Linear(hidden, kv_inner, bias=bias)
        self.v_proj = Linear(hidden, kv_inner, bias=bias)
        self.o_proj = Linear(inner, hidden, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        if config.use_output_norm:
            self.o_norm = RMSNorm(inner, config.rms_norm_eps)
        if config.use_output_gate:
            self.z_proj = Linear(hidden, inner, bias=bias)
        self.slopes = alibi_slopes(self.heads)
        self._decay: dict[torch.device, Tensor] = {}

    def project(self, x: Tensor, layout: SequenceLayout | ForwardBatch) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, T, H, D]`, normalised, rotated and repeated to the query heads."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (
            layout.angles(self.head_dim, self.config) if self.config.lightning_use_rope else (None, None)
        )
        if self.config.qk_norm or cos is not None:
            norms = (self.q_norm.weight, self.k_norm.weight) if self.config.qk_norm else (None, None)
            # On a GPU rounded once, to the dtype of the values: tensor cores take no float32, the states are
            # float32 anyway, and the error does not grow with the length (docs/log.md, 2026-11-26). On a CPU
            # the kernel reads float32, under autocast too: rounding would be a pass more.
            q, k = (
                norm_rope(
                    y,
                    w,
                    cos,
                    sin,
                    self.config.rms_norm_eps,
                    out_dtype=y.dtype if x.is_cuda else wide(y.dtype),
                )
                for y, w in zip((q, k), norms, strict=True)
            )
        return q, *self.repeated(k, v)

    def repeated(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, T, Hkv, D]`, each repeated for the query heads that share it."""
        if self.repeats == 1:
            return k, v
        # not repeat_interleave: its gradient is added up by atomics, this one's is a sum
        shares = (y[:, :, :, None].expand(-1, -1, -1, self.repeats, -1) for y in (k, v))
        k, v = (y.flatten(2, 3) for y in shares)
        return k, v

    def forward(self, x: Tensor, context: SequenceLayout | ForwardBatch) -> Tensor:
        attend = self._paged if isinstance(context, ForwardBatch) else self._whole
        o = attend(x, context).flatten(-2)  # type: ignore[arg-type]  # chosen by the type of context
        weight = self.o_norm.weight if self.config.use_output_norm else None
        gate = self.z_proj(x) if self.config.use_output_gate else None
        if weight is not None or gate is not None:
            o = norm_gate(o, weight, gate, self.config.rms_norm_eps)
        return self.o_proj(o)

    def decay(self, device: torch.device) -> Tensor:
        """`[H]` decay rates per token; made once for each device (a buffer would not survive the meta
        device)."""
        if device not in self._decay:
            with torch.inference_mode(False):  # training may need it later
                self._decay[device] = torch.tensor(self.slopes, dtype=torch.float32, device=device)
        return self._decay[device]

    def _paged(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Next tokens x `[1, T, W]` of the batch's sequences: `[1, T, H, D]`."""
        q, k, v = self.project(x, batch)
        return self.attend_slots(q[0], k[0], v[0], batch)[None]

    def attend_slots(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> Tensor:
        """The batch's next tokens `[T, H, D]` over the states in slots: `[T, H, D]` in v's dtype."""
        if batch.recorded is not None:
            batch.recorded[self.layer] = k, v
        return lightning_attention_slots(
            q,
            k,
            v,
            self.decay(v.device),
            batch.storage.states[self.layer],
            cu_seqlens=batch.table.cu_seqlens,
            read_slots=batch.read,
            write_slots=batch.write,
            scale=self.config.lightning_scale_value,
        )

    def _whole(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """All tokens x `[B, T, W]` of whole sequences: `[B, T, H, D]`."""
        q, k, v = (layout.pack(y) for y in self.project(x, layout))
        if not any(layout.lengths):
            return layout.unpack(v)
        before = None
        if layout.parallel is not None:
            before = layout.parallel.state_before(k, v, self.slopes, layout)
        bounds = None if layout.rectangular else layout.cu_seqlens
        scale = self.config.lightning_scale_value
        o, _ = lightning_attention(
            q, k, v, self.decay(x.device), scale=scale, initial_state=before, cu_seqlens=bounds
        )
        return layout.unpack(o)
