"""MiniCPM-SALA as a transformers model, without its head (`causal.py`): embedding and decoder layers.

It decides whether each sequence of a call (`calls.py`) attends densely or sparsely (the rule of
docs/architecture.md), and leaves the attention to the mixers. There are no buffers: rotary angles and
decays are computed where they are used, so loading through the meta device cannot corrupt them.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..ops import add_rms_norm, add_scaled
from ..ops.backends import planned_backend
from ..ops.sparse import SEARCHES
from .attention import LightningMixer, SparseMixer
from .batch import ForwardBatch
from .cache import SALACache
from .calls import Call, unpacked
from .checkpoint import load_strictly
from .compat import CACHE_ARGUMENT, take_cache
from .config import ATTENTION_MODES, MiniCPMSALAConfig, check_choice
from .inference import MergedLayers
from .layers import Embedding, RMSNorm, SwiGLU, activation_dtype, fuses, fuses_learning
from .layout import (
    SequenceLayout,
    SequenceParallel,
    documents_layout,
    parallel_layout,
    rows_layout,
)
from .quantised import check_quantised
from .replay import record_and_replay

logger = logging.getLogger("opensala")


class MiniCPMSALADecoderLayer(nn.Module):
    """Pre-norm mixer and feed-forward, both scaled by scale_depth / sqrt(layers).

    `gradient_checkpointing` (set by transformers' method to enable it, or by hand) keeps the layer's input
    only and runs it again in the backward pass, with the blocks that the first run selected.
    """

    def __init__(self, config: MiniCPMSALAConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = (
            SparseMixer(config, layer) if config.is_sparse(layer) else LightningMixer(config, layer)
        )
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_scale = config.residual_scale
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, context: SequenceLayout | ForwardBatch) -> Tensor:
        if isinstance(context, ForwardBatch):
            return self._run(hidden_states, context.on(hidden_states.device))
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self._run(hidden_states, context)
        # Inside forward, not around the call: hooks of the module (FSDP's) then run once.
        return checkpoint(
            self._run, hidden_states, context, use_reentrant=False, context_fn=record_and_replay
        )

    def _run(self, x: Tensor, context: SequenceLayout | ForwardBatch) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), context)
        if fuses(x, mixed) or fuses_learning(x):
            norm, dtype = self.post_attention_layernorm, activation_dtype(x)
            x, h = add_rms_norm(x, mixed, self.residual_scale, norm.weight, norm.eps, out_dtype=dtype)
            return add_scaled(x, self.mlp(h), self.residual_scale)
        if self.residual_scale == 1.0:  # teachers without scalings: two passes over memory less
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + mixed * self.residual_scale
        return x + self.mlp(self.post_attention_layernorm(x)) * self.residual_scale


class MiniCPMSALAPreTrainedModel(PreTrainedModel):
    config_class = MiniCPMSALAConfig
    config: MiniCPMSALAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniCPMSALADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"\.rotary_emb\.inv_freq$"]  # a constant that old checkpoints carry

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but strict: only safetensors are read, and every missing, unexpected or
        misshapen tensor is named in a ValueError."""
        loaded = load_strictly(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        check_quantised(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; says so if the model uses extensions that other servers of the format do not
        know."""
        asked = {
            "attn_qk_norm": self.config.attn_qk_norm,
            "attn_scale_base": self.config.attn_scale_base is not None,
            "rope_scaling": self.config.rope_scaling is not None,
            "sparse_config.lse = 'exact'": self.config.lse == "exact",
        }
        used = [name for name, on in asked.items() if on]
        if used:
            logger.warning(
                "the model uses %s: an extension that other servers of the MiniCPM-SALA format do not know",
                " and ".join(used),
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations, keys and values: that of the parameters, unless weights are stored
        narrower than they are computed with (`engine/precision.py`)."""
        embedding = self.get_input_embeddings()
        return getattr(embedding, "wide", None) or self.dtype

    def set_attention_mode(self, mode: str) -> None:
        """`auto` (dense below dense_len), `dense` or `sparse` for all calls from now on."""
        check_choice("attention_mode", mode, ATTENTION_MODES)
        self.config.attention_mode = mode

    def set_block_search(self, search: str) -> None:
        """`exact` or `hierarchical` (docs/selection.md) for all calls from now on."""
        check_choice("block_search", search, SEARCHES)
        self.config.block_search = search


class MiniCPMSALAModel(MiniCPMSALAPreTrainedModel):
    """The decoder without head: token ids (or embeddings) to normalised hidden states."""

    def __init__(self, config: MiniCPMSALAConfig) -> None:
        config.check()  # fields may have been changed since the configuration was made
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MiniCPMSALADecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.parallel: SequenceParallel | None = None  # set where rows are split over ranks
        self._said: set[tuple[Any, ...]] = set()
        self._merged: MergedLayers | None = None  # set by `merge_projections`
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SALACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cache: SALACache | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """See `MiniCPMSALAForCausalLM.forward`."""
        cache = take_cache({**kwargs, "past_key_values": past_key_values, "cache": cache})
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None:
            if not isinstance(cache, SALACache):
                raise ValueError(
                    f"{CACHE_ARGUMENT} must be an opensala.SALACache, got {type(cache).__name__}: "
                    "make one with SALACache(model.config)"
                )
            if use_cache is False:
                raise ValueError(f"{CACHE_ARGUMENT} with use_cache=False: drop one of the two")
            cache.check_config(self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        call = Call.of(
            inputs_embeds,
            attention_mask,
            position_ids,
            cu_seqlens,
            has_cache=cache is not None,
            use_cache=bool(use_cache),
            parallel=self.parallel,
        )
        cached = cache is not None or (use_cache if use_cache is not None else self.config.use_cache)
        if cached and call.packed:
            if use_cache:
                raise ValueError("packed documents cannot be cached: pass use_cache=False")
            cached = False
        gradients = torch.is_grad_enabled() and cache is None and not use_cache
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        every: list[Tensor] | None = [] if wanted else None  # what comes into each layer, then the output
        x = inputs_embeds * self.config.scale_emb
        if gradients or self.parallel is not None:
            cache, last = None, self._learn(x, call, every)
        else:
            cache = SALACache(self.config) if cache is None else cache
            with torch.no_grad():
                last = self._read(x, call, cache, input_ids if not call.packed else None, every)
        output = BaseModelOutputWithPast(
            last_hidden_state=last,
            hidden_states=None if every is None else (*every, last),
            **{CACHE_ARGUMENT: cache if cached and not gradients else None},
        )
        return output if return_dict is not False else output.to_tuple()

    def read_whole(self, input_ids: Tensor) -> Tensor:
        """Normalised hidden states `[B, T, W]` of whole sequences `[B, T]`, as in training: without a cache,
        whether gradients are wanted or not."""
        x = self.embed(input_ids)
        return self._learn(x, Call.of(x, parallel=self.parallel), None)

    def embed(self, input_ids: Tensor) -> Tensor:
        """What comes into the first layer, `[B, T, W]`, for ids `[B, T]`."""
        return self.embed_tokens(input_ids) * self.config.scale_emb

    def read_layers(self, x: Tensor, start: int, stop: int | None = None) -> Tensor:
        """Layers `start` to `stop` (to the last one, and the norm behind it, if None) of whole sequences.

        Args:
            x: hidden states before layer `start`, `[B, T, W]`, as `embed` or this method gives them.

        Returns:
            `[B, T, W]`; from `embed` through all layers, what `read_whole` gives.
        """
        layout = self._layout(Call.of(x, parallel=self.parallel), x.device)
        for layer in self.layers[start:stop]:
            x = layer(x, layout)
        return self.norm(x) if stop is None else x

    def _learn(self, x: Tensor, call: Call, every: list[Tensor] | None) -> Tensor:
        """Whole sequences with gradients: normalised hidden states `[B, T, W]`."""
        layout = self._layout(call, x.device)
        self.say_attention(layout.sparse, x)
        for layer in self.layers:
            if every is not None:
                every.append(x)
            x = layer(x, layout)
        return self.norm(x)

    def _read(
        self, x: Tensor, call: Call, cache: SALACache, ids: Tensor | None, every: list[Tensor] | None
    ) -> Tensor:
        """The next tokens of a cache's rows, without gradients: normalised hidden states `[B, T, W]`."""
        cache.begin_call(len(call.counts), x.shape[1])
        steps = cache.plan(call.counts)
        positions = None if call.positions is None else call.positions.expand(call.shape).flatten()
        made: list[tuple[Tensor | None, list[Tensor]]] = []
        try:
            for pieces in steps:
                where = None
                if call.places is not None or len(steps) > 1:
                    where = torch.cat([call.places_of(p.row)[p.offset : p.offset + p.count] for p in pieces])
                self.say_attention([p.sparse for p in pieces], x)
                chosen = positions if positions is None or where is None else positions[where]
                batch = cache.step(pieces, x, self.layer_devices(), chosen)
                layers: list[Tensor] | None = None if every is None else []
                flat = x.flatten(0, 1)
                last = self.run_batch(flat[None] if where is None else flat[where][None], batch, layers)
                made.append((where, [*(layers or []), last]))
        except BaseException:
            cache.discard()
            raise
        cache.commit(call.counts, x.shape[1], call.row_ids(ids))
        *rest, last = unpacked(made, x)
        if every is not None:
            every += rest
        return last

    def layer_devices(self) -> list[torch.device]:
        """Where each layer lies (and so do its pages and states)."""
        return [next(layer.parameters()).device for layer in self.layers]

    def run_batch(self, x: Tensor, batch: ForwardBatch, every: list[Tensor] | None = None) -> Tensor:
        """Scaled embeddings `[1, T, W]` of a batch's tokens through all layers: normalised hidden states.

        States and pages are written; nothing else knows of it. What comes into each layer is put into
        `every`.
        """
        merged = None if every is not None else self.merged_layers(x)
        if merged is not None:
            return merged.run(x, batch)
        for layer in self.layers:
            if every is not None:
                every.append(x)
            x = layer(x, batch)
        return self.norm(x)

    def merge_projections(self, device: torch.device | None = None) -> None:
        """Prepare for inference on a GPU: projections of one input become one product (`model/inference.py`).

        Parameters keep their names, shapes and values, and lie on `device` afterwards (where the embedding
        is, if None). A model with modules of another kind is left as it is, which is said.
        """
        device = device or self.embed_tokens.weight.device
        old = self._merged
        here = old is not None and (old.device == device or device == torch.device(old.device.type))
        if old is not None and here and old.is_current and old.disturbed() is None:
            return
        try:
            self._merged = MergedLayers(self, device)
        except ValueError as error:
            self._say_not_merged(str(error))

    def merged_layers(self, like: Tensor) -> MergedLayers | None:
        """The layers as `merge_projections` made them, if they can serve activations like `like` now."""
        merged = self._merged
        if merged is not None and like.device != merged.device and not merged.is_current:
            merged = self._merged = None  # the model was moved: nobody needs the old weights
        if merged is None or like.device != merged.device or not fuses(like):
            return None
        reason = merged.disturbed()
        if reason is not None:
            self._say_not_merged(reason)
            return None
        if not merged.is_current:  # someone moved or replaced parameters
            self.merge_projections(merged.device)
        return self._merged

    def _say_not_merged(self, reason: str) -> None:
        if ("one by one", reason) not in self._said:
            self._said.add(("one by one", reason))
            logger.warning("the projections of a layer run one by one, not merged: %s", reason)

    def _layout(self, call: Call, device: torch.device) -> SequenceLayout:
        """The layout of a call without cache, for layers with gradients."""
        if self.parallel is not None:
            return parallel_layout(
                call.shape, call.bounds, self.parallel, self._sparse, device, call.positions
            )
        if call.packed:
            assert call.bounds is not None, "packed documents have bounds"
            return documents_layout(call.bounds, self._sparse(call.counts), device)
        return rows_layout(call.shape, call.valid, self._sparse(call.counts), device, call.positions)

    def _sparse(self, lengths: list[int]) -> list[bool]:
        check_choice("attention_mode", self.config.attention_mode, ATTENTION_MODES)
        return [self.config.attends_sparsely(n) for n in lengths]

    def say_attention(self, modes: Iterable[bool], like: Tensor) -> None:
        """State once for each mode (sparse or not), device and setting how the layers attend."""
        for sparse in set(modes):
            key = (sparse, like.device, self.config.attention_mode, self.config.block_search)
            if key not in self._said:
                self._said.add(key)
                # shown without any logging set up: which attention runs is never a guess
                logger.warning(describe_attention(self.config, "sparse" if sparse else "dense", like))


def describe_attention(config: MiniCPMSALAConfig, mode: str, like: Tensor) -> str:
    """One line: which mode and which backend each kind of layer uses for activations like `like`."""
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    spec, backend = config.block_spec, planned_backend(like)
    search = "" if config.block_search == "exact" else f", {config.block_search} search"
    how = (
        f"block-sparse, {spec.num_blocks} blocks of {spec.block_size}{search} ({backend})"
        if mode == "sparse"
        else "dense"
    )
    return (
        f"attention on {like.device.type}: {sparse} sparse layers {how}; "
        f"{config.num_hidden_layers - sparse} lightning layers "
        f"({backend}); mode {config.attention_mode}, sparse from {config.dense_len} tokens"
    )
