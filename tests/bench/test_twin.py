"""Full attention timed from some of the layers."""

import pytest
import torch
from transformers import Qwen3Config

from opensala.bench import twin

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 6}
IDS = torch.arange(3, 40)[None]


class Clock:
    """A second for each layer that was run, ten for all else of a call."""

    def __init__(self, model):
        self.now = 0.0
        model.model.embed_tokens.register_forward_hook(lambda *_: self.pass_(10))
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: self.pass_(1))

    def pass_(self, seconds):
        self.now += seconds

    def __call__(self):
        return self.now


@pytest.mark.parametrize("layers", [2, 4, 6, 1000])
def test_some_layers_tell_what_all_would_take(layers):
    model = twin.build_dense(Qwen3Config(**SIZES))
    seen = []
    found = twin.time_layers(model, IDS, layers, 3, lambda: seen.append(1), Clock(model))
    assert found.time_to_first_token == pytest.approx(16)
    assert found.decode_tokens_per_second == pytest.approx(1 / 16)
    assert found.cache_bytes == 6 * 2 * 16 * 4 * IDS.shape[1]
    assert len(seen) == (6 if layers >= 6 else 1 + layers)
    assert len(model.model.layers) == model.config.num_hidden_layers == 6


def test_one_layer_tells_nothing():
    model = twin.build_dense(Qwen3Config(**SIZES))
    with pytest.raises(ValueError, match="layers must be at least 2, or all 6, got 1"):
        twin.time_layers(model, IDS, 1)
