"""MiniCPM-SALA with its language-model head: logits, loss, and generation with a cache that knows its
prompt."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import SALACache
from .compat import CACHE_ARGUMENT, take_cache
from .config import MiniCPMSALAConfig
from .layers import Linear
from .modeling import MiniCPMSALAModel, MiniCPMSALAPreTrainedModel


class MiniCPMSALAForCausalLM(MiniCPMSALAPreTrainedModel, GenerationMixin):
    """MiniCPM-SALA with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniCPMSALAConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMSALAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        cache: SALACache | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: `[B, T]` token ids (or `inputs_embeds` `[B, T, hidden]`).
            attention_mask: `[B, past + T]` of 0 and 1; zeros (padding, on any side) are left out entirely.
            position_ids: `[B, T]`; used without a cache or mask. In a single row, a fall back to 0 starts a
                new packed document.
            past_key_values, cache: a `SALACache`, under either name (`cache` is that of transformers 5.24 and
                later). Without one, a call that needs no gradients and packs no documents makes one if
                `use_cache` or the configuration says so.
            labels: `[B, T]`, -100 where there is no loss; shifted here.
            logits_to_keep: compute logits for the last so many positions (0: all).
            cu_seqlens: `[N + 1]` boundaries of documents packed in one row (the whole row, where it is split
                over ranks).
        """
        if labels is not None and self.model.parallel is not None:
            raise ValueError(
                "labels are shifted here, which loses a token at each border between ranks: shift them "
                "before the sequence is split and take the loss from the logits"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            cache=cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept] / self.config.logit_divisor)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_ARGUMENT: getattr(outputs, CACHE_ARGUMENT)},
        )
        return output if return_dict is not False else output.to_tuple()

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with a `SALACache` that knows the whole prompt before its first token is read.

        A cache that is passed must hold the beginning of the prompt: `input_ids` are then the whole text, of
        which only what the cache lacks is read (or only the new tokens, with an `attention_mask` as long as
        the whole).

        Raises:
            ValueError: another `cache_implementation`, a cache that holds all of the prompt or other tokens
                than its beginning, a cache together with use_cache=False.
            RuntimeError: transformers did not use the cache, so that the answer would have come from nothing.
        """
        cache = take_cache(kwargs)
        settings = generation_config or self.generation_config
        kind = kwargs.get("cache_implementation", settings.cache_implementation)
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation must be unset or 'dynamic' for MiniCPM-SALA, got {kind!r}"
            )
        given = {
            name: getattr(settings, name, None) for name in ("use_cache", "max_new_tokens", "is_assistant")
        }
        given |= {name: value for name, value in kwargs.items() if name in given}
        if given["use_cache"] is False:
            if cache is not None:
                raise ValueError(f"use_cache=False with {CACHE_ARGUMENT}: drop one of the two")
            return super().generate(inputs, generation_config, **kwargs)
        cache = SALACache(self.config, record_past=bool(given["is_assistant"])) if cache is None else cache
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        cache.announce(
            ids, kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), given["max_new_tokens"] or 0
        )
        before = cache.padded_length
        output = super().generate(inputs, generation_config, **kwargs, **{CACHE_ARGUMENT: cache})
        if cache.padded_length == before:
            raise RuntimeError(
                "the model never saw the cache that generate was given, so its answer is worth nothing: "
                "this version of transformers is not supported"
            )
        return output
