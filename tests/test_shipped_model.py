"""The model that ships: its size, its format, that it retrieves, and what a long prompt costs in memory."""

import json
import random
import subprocess
import sys

import pytest

from opensala.data.conversations import insert
from opensala.data.needles import needle_document
from opensala.data.prompts import PromptFormat
from opensala.data.text import chapter, long_document
from opensala.data.written import ABSENT
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


STATED = {
    "The price of the oak table is $1,250.": ("What is the price of the oak table?", "$1,250"),
    "The opening date of the annex is 22 May 2019.": (
        "What is the opening date of the annex?",
        "22 May 2019",
    ),
    "The address of the backup server is 10.0.4.17.": (
        "What is the address of the backup server?",
        "10.0.4.17",
    ),
    "The departure time of the last ferry is 22:45.": (
        "What is the departure time of the last ferry?",
        "22:45",
    ),
    "The part number of the fuel pump is AX-7731-Q.": (
        "What is the part number of the fuel pump?",
        "AX-7731-Q",
    ),
    "The captain of Silver Heron is Orla Brandt.": ("Who is the captain of Silver Heron?", "Orla Brandt"),
}
MISSING = (
    "What is the price of the marble statue?",
    "What is the value of DEFAULT_PORT_RANGE?",
    "Who is the owner of the yellow barge?",
    "What is the top speed of the mountain train?",
)


def test_it_copies_values_as_people_write_them_and_says_what_is_absent(engine):
    """In 8,000 tokens of the language's reference, each behind a sentence, sparse attention."""
    text = insert(random.Random(1), chapter("specialnames", 20_000), list(STATED))
    asked = [*STATED.values(), *((question, ABSENT) for question in MISSING)]
    form = PromptFormat(engine.tokenizer)
    prompts = [form.encode(form.question(text, question)) for question, _ in asked]
    assert len(prompts[0]) > 6_000
    done = engine.generate(prompts, SamplingParams(max_tokens=24, stop=tuple(form.stop_strings)))
    answers = [form.answer(completion.text) for completion in done]
    right = [answer == expected for answer, (_, expected) in zip(answers, asked, strict=True)]
    assert sum(right) >= 9, list(zip(asked, answers, strict=True))


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
