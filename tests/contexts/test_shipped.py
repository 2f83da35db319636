"""The shipped model with documents of dense and sparse lengths: kept, reopened, extended, moved; bit for
bit."""

import subprocess
import sys
from pathlib import Path

import pytest

from opensala.contexts import Context
from opensala.contexts.store import export, unpack
from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, ask, load_engine

from .tools import outcome

ROOT = Path(__file__).parents[2]
FACT = "\nThe access code for the north gate is 48213.\n"
QUESTIONS = ("What is the access code for the north gate?", "Who is the captain of Silver Heron?")


@pytest.fixture(scope="module")
def loaded():
    return load_engine(options=EngineOptions(max_cached_tokens=1000))


def new(loaded):
    return Engine(loaded.model, loaded.tokenizer, EngineOptions(max_cached_tokens=30_000))


@pytest.mark.parametrize("tokens", [900, 4090, 9000])
def test_kept_and_reopened(loaded, tokens, tmp_path):
    """900 and 4,090 tokens are read densely; with a question, 4,090 pass dense_len: everything is read
    again."""
    text = long_document(6 * tokens, seed=3)
    text = f"{text[:500]}{FACT}{text[500:]}"
    places = loaded.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    docs = [Document("a.txt", text[: places[tokens - 1][1]])]
    wanted = [outcome(ask(new(loaded), docs, question, quiet=True)) for question in QUESTIONS]
    Context.ingest(new(loaded), docs, tmp_path / "a.ctx").close()
    export(tmp_path / "a.ctx", tmp_path / "a.tar")
    unpack(tmp_path / "a.tar", tmp_path / "b.ctx")
    for path in ("a.ctx", "b.ctx"):
        running = new(loaded)
        with Context.open(running, tmp_path / path) as context:
            found = [context.ask(question) for question in QUESTIONS]
            assert [outcome(f) for f in found] == wanted
            again = found[0].prompt_tokens >= 4096 > len(context.tokens)
            assert again == (tokens == 4090)
            assert any("were read again" in note for note in found[0].notes) == again
            assert again or [f.reused_tokens for f in found] == [len(context.tokens)] * 2
            pages = -(-len(context.tokens) // 64)  # K, V and compressed keys, and the states behind the last
            shapes = pages * 64 * 1596 + 9 * 4 * 32 * 32 * 4
            assert 1 <= context.manifest.segments[-1].size / shapes < 1.02
    running.check_integrity()


def test_extended(loaded, tmp_path):
    first = [Document("a.txt", long_document(20_000, seed=5)[:20_000])]
    second = [Document("b.txt", f"{FACT}{long_document(3_000, seed=6)[:3_000]}")]
    Context.ingest(new(loaded), first, tmp_path / "a.ctx").close()
    running = new(loaded)
    with Context.open(running, tmp_path / "a.ctx", write=True) as context:
        before, wanted = len(context.tokens), f"{first[0].text}\n\n=== b.txt ===\n{second[0].text}"
        context.extend(second)
        joined = ask(new(loaded), [Document("ab", wanted)], QUESTIONS[0], quiet=True)
        assert outcome(context.ask(QUESTIONS[0])) == outcome(joined) and joined.text == "48213"
        assert len(context.tokens) - before < 1500
    with Context.open(new(loaded), tmp_path / "a.ctx") as context:
        found = context.ask(QUESTIONS[0])
        assert outcome(found) == outcome(joined) and found.reused_tokens == len(context.tokens)


def test_damaged_a_few_times():
    """In full: scripts/damage_contexts.py, which does 1,000 flips, 100 cuts and 50 kills."""
    words = [
        "scripts/damage_contexts.py",
        "--flips",
        "40",
        "--cuts",
        "10",
        "--ask-every",
        "5",
        "--kills",
        "0",
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 flipped: found by the check" in done.stdout
    assert "10 cut short: found by the check" in done.stdout
