"""A model of transformers asked question after question: the same answers as each alone, what of a prompt is
read, and contexts stretched."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opensala.engine import shipped_model
from opensala.evaluate import original
from opensala.evaluate.original import Original

BUDGET = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **sizes
    )
    LlamaForCausalLM(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def alone(folder, ids):
    """What transformers generates after `ids` with nothing read before."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([ids])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=BUDGET, do_sample=False
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_answers_are_those_of_each_prompt_alone(folder, monkeypatch):
    monkeypatch.setattr(original, "PIECE", 16)
    rng = random.Random(4)
    ids = lambda n: [rng.randrange(300, 1500) for _ in range(n)]  # noqa: E731
    document = ids(70)
    prompts = [document + ids(9), document + ids(20), document[:31], document[:31] + ids(50), ids(40)]
    asked = Original(folder)
    found = list(asked.answers("five", prompts, [BUDGET] * 5))
    assert [one.text for one in found] == [alone(folder, prompt) for prompt in prompts]
    assert [one.read_tokens for one in found] == [79, 20, 1, 50, 40]
    assert all(0 < one.new_tokens <= BUDGET for one in found)
    again = next(asked.answers("again", [prompts[4]], [BUDGET]))
    assert again.text == found[4].text and again.read_tokens == 1
    continued = asked._ids + ids(5)
    going_on = next(asked.answers("on", [continued], [BUDGET]))
    assert going_on.text == alone(folder, continued) and going_on.read_tokens == 5


def test_stretched_positions_are_yarn_of_the_factor(folder):
    ids = [random.Random(5).randrange(300, 1500) for _ in range(300)]
    with pytest.raises(ValueError, match="300 tokens and 9 of an answer .* 256 positions"):
        next(Original(folder).answers("long", [ids], [BUDGET]))
    stretched = Original(folder, stretch=2)
    assert stretched.max_tokens == 512
    rope = stretched._model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2, 256)
    plain = Original(folder)
    assert not torch.equal(stretched._model.model.rotary_emb.inv_freq, plain._model.model.rotary_emb.inv_freq)
    assert next(stretched.answers("long", [ids], [BUDGET])).read_tokens == 300


def test_positions_that_are_stretched_already_are_refused(folder, tmp_path):
    config = LlamaConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be stretched"):
        Original(tmp_path, stretch=2)
