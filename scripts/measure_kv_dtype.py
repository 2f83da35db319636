"""What keys and values in fewer bits change: the figures of docs/contexts.md.

    python scripts/measure_kv_dtype.py --kv-dtype bfloat16,int8

Hides 20 facts in a document and asks for each, in full precision and in the others; compares the answers and
the log-probabilities of the document's last 1,000 tokens.
"""

import argparse
import logging
import math
import random

from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, SamplingParams, ask, load_engine
from opensala.engine.answer import Generation

PLACES = [
    f"{side} {what}"
    for side in ("north", "south", "east", "west", "old")
    for what in ("gate", "tower", "mill", "vault")
]
SCORED = 1000


def document(tokens: int) -> tuple[str, dict[str, int]]:
    """About so many tokens of text, and the code of each place in it."""
    draw, text = random.Random(5), long_document(int(tokens * 2.9))
    codes = {place: draw.randrange(10_000, 99_999) for place in PLACES}
    step, parts = len(text) // (len(PLACES) + 1), []
    for n, (place, code) in enumerate(codes.items()):
        parts += [text[n * step : (n + 1) * step], f"\nThe access code for the {place} is {code}.\n"]
    return "".join([*parts, text[len(PLACES) * step :]]), codes


def scores(engine: Engine, text: str, tokens: int) -> list[float]:
    """Log-probabilities of the last tokens of the text's beginning."""
    ids = engine.encode(text)[:tokens]
    found = engine.generate([ids], SamplingParams(max_tokens=0, score_from=len(ids) - SCORED))[0]
    return [logprob for logprob, _ in found.scores]


def answered(engine: Engine, text: str, codes: dict[str, int]) -> list[Generation]:
    """An answer for each place."""
    return [
        ask(
            engine,
            [Document("d", text)],
            f"What is the access code for the {place}?",
            SamplingParams(max_tokens=12),
            quiet=True,
        )
        for place in codes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="about so many")
    parser.add_argument("--kv-dtype", default="bfloat16,int8", help="beside auto")
    parser.add_argument("--model", help="a checkpoint; default: the shipped model")
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    text, codes = document(options.tokens)
    exact: tuple[list[Generation], list[float]] | None = None
    for kv_dtype in ["auto", *options.kv_dtype.split(",")]:
        bounds = EngineOptions(max_cached_tokens=2 * options.tokens + 20_000, kv_dtype=kv_dtype)
        engine = load_engine(options.model, dtype="float32", options=bounds)
        said, found = answered(engine, text, codes), scores(engine, text, options.tokens)
        right = sum(str(code) in answer.text for code, answer in zip(codes.values(), said, strict=True))
        loss = -sum(found) / len(found)
        print(
            f"{kv_dtype}: {right} of {len(codes)} facts in {said[0].prompt_tokens:,} tokens, loss of the "
            f"last {SCORED} tokens {loss:.4f}, {said[0].cache_bytes / 1e6:.1f} MB",
            flush=True,
        )
        exact = exact or (said, found)
        pairs = list(zip(exact[0], said, strict=True))
        apart = [abs(math.log((a.confidence or 1.0) / (b.confidence or 1.0))) for a, b in pairs]
        tokens = [abs(a - b) for a, b in zip(exact[1], found, strict=True)]
        print(
            f"  the same answer {sum(a.text == b.text for a, b in pairs)} of {len(codes)}, the logarithm of "
            f"its mean probability {max(apart):.4f} apart at most; log-probabilities of tokens "
            f"{sum(tokens) / len(tokens):.4f} apart, {max(tokens):.3f} at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
