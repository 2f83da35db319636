"""The recipe for SmolLM2, every kind of its stages, on a Llama of 30 layers that is a thousandth as large."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opensala.convert.config import Probes
from opensala.engine import shipped_model
from opensala.model import MiniCPMSALAForCausalLM
from opensala.runs import read_json
from opensala.train.overrides import bind
from opensala.train.pipeline import train
from opensala.train.recipe import Halo
from opensala.train.recipes import recipe_named
from opensala.train.start import Start

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def reduced(corpus):
    """A step or two of each stage (one of those that differ in length alone), of short sequences from a few
    texts."""
    text = str(corpus / "text.jsonl")
    recipe = bind(
        recipe_named("smollm2-135m"),
        {"text": text, "code": text, "questions": f"synthetic:questions:{text}"},
    )
    stages = []
    for stage in recipe.stages:
        if stage.name in ("long_decay_16k", "long_decay_32k"):
            continue
        if isinstance(stage, Halo):
            whole = stage.config
            phases = {
                name: replace(phase, steps=2, batch=1, length=256, warmup=1)
                for name, phase in whole.phases().items()
            }
            small = replace(
                whole,
                **phases,
                length=256,
                calibrate_tokens=512,
                lora_rank=2,
                probes=Probes(128, 2, 2),
                sparse_config={**whole.sparse_config, "dense_len": 128, "topk": 2, "window_size": 64},
                compute="float32",
            )
            stages.append(Halo(small))
        else:
            stages.append(replace(stage, sequence=512, tokens=512, batch_tokens=512))
    return replace(recipe, stages=tuple(stages), micro_tokens=512, probe_tokens=512)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def test_every_stage_runs(teacher, corpus, tmp_path):
    recipe = reduced(corpus)
    train(recipe, tmp_path / "run", start=Start(teacher=str(teacher)), device="cpu", quiet=True)
    model = MiniCPMSALAForCausalLM.from_pretrained(tmp_path / "run" / "model")
    kept = [i for i in range(30) if model.config.is_sparse(i)]
    assert kept == [0, 6, 17, 18, 20, 21, 23, 29]
    losses = read_json(tmp_path / "run" / "stages.json")
    assert list(losses) == [stage.name for stage in recipe.stages[1:]]
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == TEMPLATE


def test_without_the_teacher_it_says_how_to_get_it(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENSALA_HOME", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="opensala pull smollm2-135m"):
        train(reduced(corpus), tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run").exists()
