"""MiniCPM-SALA as a transformers model: embedding, decoder layers, head, loss and generation hooks.

It decides which sequences a call holds and whether each attends densely or sparsely (the rule of
docs/architecture.md), and leaves the attention to the mixers. There are no buffers: rotary angles and
decays are computed where they are used, so loading through the meta device cannot corrupt them.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..ops.backends import planned_backend
from ..ops.sparse import SEARCHES
from .attention import LightningMixer, SparseMixer
from .cache import SALACache
from .checkpoint import load_strictly
from .config import ATTENTION_MODES, MiniCPMSALAConfig, check_choice
from .layers import RMSNorm, SwiGLU
from .layout import (
    SequenceLayout,
    SequenceParallel,
    documents_layout,
    packed_bounds,
    parallel_layout,
    rows_layout,
)

logger = logging.getLogger("opensala")


class MiniCPMSALADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm mixer and feed-forward, both scaled by scale_depth / sqrt(layers)."""

    def __init__(self, config: MiniCPMSALAConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = (
            SparseMixer(config, layer) if config.is_sparse(layer) else LightningMixer(config, layer)
        )
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_scale = config.residual_scale

    def forward(
        self, hidden_states: Tensor, layout: SequenceLayout, cache: SALACache | None = None
    ) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(hidden_states), layout, cache)
        hidden_states = hidden_states + mixed * self.residual_scale
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.residual_scale


class MiniCPMSALAPreTrainedModel(PreTrainedModel):
    config_class = MiniCPMSALAConfig
    config: MiniCPMSALAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniCPMSALADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"\.rotary_emb\.inv_freq$"]  # a constant that old checkpoints carry
    _can_record_outputs = {"hidden_states": MiniCPMSALADecoderLayer}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but strict: only safetensors are read, and every missing, unexpected or
        misshapen tensor is named in a ValueError."""
        return load_strictly(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

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
                "%s uses %s: an extension that other servers of the MiniCPM-SALA format do not know",
                save_directory,
                " and ".join(used),
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

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
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MiniCPMSALADecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.parallel: SequenceParallel | None = None  # set where rows are split over ranks
        self._said: set[str] = set()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SALACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `MiniCPMSALAForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if past_key_values is not None and not isinstance(past_key_values, SALACache):
            raise ValueError(
                f"past_key_values must be an opensala.SALACache, got {type(past_key_values).__name__}: "
                "make one with SALACache(model.config)"
            )
        cache = past_key_values
        if use_cache and cache is None:
            cache = SALACache(self.config)
        shape = (inputs_embeds.shape[0], inputs_embeds.shape[1])
        layout = self._layout(shape, attention_mask, position_ids, cache, cu_seqlens, inputs_embeds.device)
        self._say(layout, inputs_embeds)

        hidden_states = inputs_embeds * self.config.scale_emb
        try:
            for layer in self.layers:
                hidden_states = layer(hidden_states, layout, cache)
        except BaseException:
            if cache is not None:
                cache.discard()
            raise
        if cache is not None:
            cache.commit(layout.lengths, shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=cache if use_cache else None
        )

    def _layout(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: SALACache | None,
        cu_seqlens: Tensor | None,
        device: torch.device,
    ) -> SequenceLayout:
        if self.parallel is not None:
            return self._split_rows(
                self.parallel, shape, attention_mask, position_ids, cache, cu_seqlens, device
            )
        batch, length = shape
        empty = cache is None or cache.columns == 0
        bounds = packed_bounds(position_ids, cu_seqlens, length) if empty and attention_mask is None else None
        if cu_seqlens is not None and (bounds is None or batch != 1):
            raise ValueError("cu_seqlens needs a single row, no attention_mask and an empty cache")
        if bounds is not None and len(bounds) > 2:
            if cache is not None and cu_seqlens is not None:
                raise ValueError("packed documents cannot be cached: pass use_cache=False")
            if cache is None:
                ends = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
                return documents_layout(bounds, self._sparse(ends), device)
        valid = None
        if attention_mask is not None:
            if (
                attention_mask.dim() != 2
                or attention_mask.shape[0] != batch
                or attention_mask.shape[1] < length
            ):
                raise ValueError(
                    f"attention_mask must be [batch, past + new tokens] = [{batch}, >= {length}] of 0 and 1, "
                    f"got shape {list(attention_mask.shape)}"
                )
            valid = attention_mask[:, -length:].bool()
            if bool(valid.all()):
                valid = None
        past = cache.past_lengths(batch) if cache is not None else [0] * batch
        new = [length] * batch if valid is None else valid.sum(1).tolist()
        ends = [a + b for a, b in zip(past, new, strict=True)]
        decisive = ends if cache is None else cache.decisive_lengths(ends)
        custom = position_ids if cache is None and attention_mask is None else None
        return rows_layout(shape, valid, past, self._sparse(decisive), device, custom)

    def _split_rows(
        self,
        parallel: SequenceParallel,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: SALACache | None,
        cu_seqlens: Tensor | None,
        device: torch.device,
    ) -> SequenceLayout:
        if cache is not None or attention_mask is not None:
            raise ValueError(
                "where sequences are split over ranks there is no cache and no padding: pass use_cache=False "
                "and no attention_mask"
            )
        if cu_seqlens is not None and shape[0] != 1:
            raise ValueError(f"cu_seqlens needs a single row, got {shape[0]}")
        bounds = packed_bounds(None, cu_seqlens, shape[1] * parallel.ranks)
        return parallel_layout(shape, bounds, parallel, self._sparse, device, position_ids)

    def _sparse(self, lengths: list[int]) -> list[bool]:
        mode = self.config.attention_mode
        check_choice("attention_mode", mode, ATTENTION_MODES)
        return [mode == "sparse" or (mode == "auto" and n >= self.config.dense_len) for n in lengths]

    def _say(self, layout: SequenceLayout, like: Tensor) -> None:
        """State once for each device and mode how the layers attend."""
        for sparse in set(layout.sparse):
            line = describe_attention(self.config, "sparse" if sparse else "dense", like)
            if line not in self._said:
                self._said.add(line)
                logger.warning(
                    line
                )  # shown without any logging set up: which attention runs is never a guess


def describe_attention(config: MiniCPMSALAConfig, mode: str, like: Tensor) -> str:
    """One line: which mode and which backend each kind of layer uses for activations like `like`."""
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    spec, backend = config.block_spec, planned_backend(like)
    search = "" if config.block_search == "exact" else f", {config.block_search} search"
    how = (
        f"block-sparse, {spec.num_blocks} blocks of {spec.block_size}{search} ({backend})"
        if mode == "sparse"
        else "dense (scaled_dot_product_attention)"
    )
    return (
        f"attention on {like.device.type}: {sparse} sparse layers {how}; "
        f"{config.num_hidden_layers - sparse} lightning layers "
        f"chunked ({backend}); mode {config.attention_mode}, sparse from {config.dense_len} tokens"
    )


class MiniCPMSALAForCausalLM(MiniCPMSALAPreTrainedModel, GenerationMixin):
    """MiniCPM-SALA with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniCPMSALAConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMSALAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SALACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: `[B, T]` token ids (or `inputs_embeds` `[B, T, hidden]`).
            attention_mask: `[B, past + T]` of 0 and 1; zeros (padding, on any side) are left out entirely.
            position_ids: `[B, T]`; used without a cache or mask. In a single row, a fall back to 0 starts a
                new packed document.
            past_key_values: a `SALACache`.
            labels: `[B, T]`, -100 where there is no loss; shifted here.
            logits_to_keep: compute logits for the last so many positions (0: all).
            cu_seqlens: `[N + 1]` boundaries of documents packed in one row (the whole row, where it is split
                over ranks).
        """
        if labels is not None and self.model.parallel is not None:
            raise ValueError(
                "labels are shifted here, which loses a token at each border between ranks: shift them "
                "before the "
                "sequence is split and take the loss from the logits"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept] / self.config.logit_divisor)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # --- generation hooks of transformers ---

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation must be unset or 'dynamic' for MiniCPM-SALA, got "
                f"{generation_config.cache_implementation!r}"
            )
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SALACache(
                self.config, record_past=bool(generation_config.is_assistant)
            )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, SALACache):
            mask = model_kwargs.get("attention_mask")
            total = input_ids.shape[1]
            embeds = model_kwargs.get("inputs_embeds")
            total = max(total, 0 if embeds is None else embeds.shape[1])
            if mask is not None:
                new = mask[:, cache.columns :].sum(1).tolist()
            else:
                rows = input_ids.shape[0] if embeds is None else embeds.shape[0]
                new = [total - cache.columns if total > cache.columns else total] * rows
            cache.begin_prompt([int(n) for n in new], generation_config.max_new_tokens or 0)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
