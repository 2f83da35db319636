"""What keys and values in int8 change, with the shipped model: the figures of docs/contexts.md.

Hides 20 facts in a document and asks for each, in full precision and in int8; compares the answers and the
log-probabilities of the document's last 1,000 tokens.
"""

import argparse
import logging
import math
import random

from opensala.data.text import long_document
from opensala.engine import Document, Engine, EngineOptions, SamplingParams, ask, load_engine

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="about so many")
    options = parser.parse_args()
    logging.getLogger("opensala").setLevel(logging.ERROR)
    text, codes = document(options.tokens)
    answers, logprobs, confidence = [], [], []
    for kv_dtype in ("auto", "int8"):
        bounds = EngineOptions(max_cached_tokens=2 * options.tokens + 20_000, kv_dtype=kv_dtype)
        engine = load_engine(dtype="float32", options=bounds)
        said = [
            ask(
                engine,
                [Document("d", text)],
                f"What is the access code for the {p}?",
                SamplingParams(max_tokens=12),
                quiet=True,
            )
            for p in codes
        ]
        right = sum(str(code) in answer.text for code, answer in zip(codes.values(), said, strict=True))
        print(f"{kv_dtype}: {right} of {len(codes)} facts in {said[0].prompt_tokens:,} tokens", flush=True)
        answers.append([answer.text for answer in said])
        confidence.append([answer.confidence or 1.0 for answer in said])
        logprobs.append(scores(engine, text, options.tokens))
    print(f"the same answer: {sum(a == b for a, b in zip(*answers, strict=True))} of {len(codes)}")
    apart = [abs(math.log(a / b)) for a, b in zip(*confidence, strict=True)]
    print(f"logarithm of the answers' mean probability: {max(apart):.4f} apart at most")
    apart = [abs(a - b) for a, b in zip(*logprobs, strict=True)]
    losses = [-sum(x) / len(x) for x in logprobs]
    print(
        f"log-probabilities of {SCORED} tokens: {sum(apart) / len(apart):.4f} apart, {max(apart):.3f} at "
        f"most; loss {losses}"
    )


if __name__ == "__main__":
    main()
