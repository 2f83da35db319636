"""The model that ships: its size, its format, that it retrieves, and what a long prompt costs in memory."""

import json
import random
import subprocess
import sys

import pytest

from opensala.data.needles import needle_document
from opensala.data.text import long_document
from opensala.engine import EngineOptions, SamplingParams, load_engine, shipped_model


@pytest.fixture(scope="module")
def engine():
    return load_engine(options=EngineOptions(max_cached_tokens=20_000))


def test_size_and_shape(engine):
    assert sum(f.stat().st_size for f in shipped_model().iterdir()) <= 15 << 20
    config = engine.config
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    assert config.num_hidden_layers >= 12 and sparse * 4 == config.num_hidden_layers
    assert sum(p.numel() for p in engine.model.parameters()) > 2_000_000
    assert not config.attn_qk_norm and config.lse == "coarse"  # any server of the released format can load it


def test_it_finds_facts_far_beyond_its_training_length(engine):
    """Ten facts, many alike, in 16K tokens (twice the longest training sequence), sparse attention."""
    rng = random.Random(11)
    document = needle_document(engine.tokenizer, long_document(200_000, seed=5), 16_384, 10, rng)
    prompts = [document.ids + trial.question for trial in document.trials]
    done = engine.generate(prompts, SamplingParams(max_tokens=24))
    answers = [completion.text.strip() for completion in done]
    assert all(c.reuse.computed < 100 for c in done[1:])  # the document is read once
    right = [answer == trial.fact.answer for answer, trial in zip(answers, document.trials, strict=True)]
    assert sum(right) >= 8, [(t.fact.statement, a) for t, a in zip(document.trials, answers, strict=True)]


def test_a_64k_prompt_stays_small_in_memory(tmp_path):
    """Resident memory of the whole process, interpreter and libraries included."""
    path = tmp_path / "long.txt"
    path.write_text(long_document(180_000, seed=3))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "opensala",
            "ask",
            str(path),
            "-q",
            "What is the value of X?",
            "--json",
            "--quiet",
            "--max-new-tokens",
            "2",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    record = json.loads(done.stdout)
    assert 50_000 < record["prompt_tokens"] < 90_000
    assert record["peak_memory_bytes"] < 1.2 * 2**30
    # K and V: 2 x 64 floats in 3 layers; windows add 5/64 of K
    per_token = record["cache_bytes"] / record["prompt_tokens"]
    assert 3 * 2 * 64 * 4 < per_token < 3 * 2 * 64 * 4 * 1.1
