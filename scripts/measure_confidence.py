"""Measure how well a model's confidence tells answers that the document gives from those it does not.

    python scripts/measure_confidence.py [--documents 20] [--length 6000]

Each document hides ten facts. It is asked for them, and for ten that are not in it (right: `not found`).
Rows go to benchmarks/confidence.csv; the table says, for each threshold of the least probability of an
answer's tokens, how many wrong answers lie below it, and how many right ones.
"""

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import typer

from opensala.data.facts import Fact, format_question, random_facts
from opensala.data.needles import needle_document
from opensala.data.text import long_document
from opensala.data.written import ABSENT
from opensala.engine import Completion, Engine, FinishReason, SamplingParams, load_engine

ROWS = Path(__file__).parents[1] / "benchmarks" / "confidence.csv"
FACTS = 10


@dataclass(frozen=True)
class Row:
    """One question: whether its answer stands in the document, what came, and how likely its tokens were."""

    text: str
    kind: str
    document: int
    question: str
    expected: str
    answer: str
    correct: int
    mean_probability: float
    least_probability: float


def documents(kind: str, characters: int, rng: random.Random) -> str:
    if kind == "code":
        return long_document(characters, seed=rng.randrange(1 << 30))
    pages = list(topics.values())
    rng.shuffle(pages)
    return "\n".join(pages)[:characters]


def ask(engine: Engine, ids: list[int], facts: list[Fact]) -> list[Completion]:
    asked = [
        engine.tokenizer(format_question(f.question), add_special_tokens=False)["input_ids"] for f in facts
    ]
    return engine.generate(
        [ids + question for question in asked], SamplingParams(max_tokens=24, stop=("\n",))
    )


def measure(engine: Engine, kind: str, count: int, length: int) -> Iterator[Row]:
    for n in range(count):
        rng = random.Random(f"{kind} {n}")
        document = needle_document(engine.tokenizer, documents(kind, 6 * length, rng), length, FACTS, rng)
        there = [trial.fact for trial in document.trials]
        others = [
            fact for fact in random_facts(rng, 3 * FACTS) if fact.question not in {f.question for f in there}
        ]
        asked = [("present", fact) for fact in there] + [("absent", fact) for fact in others[:FACTS]]
        for (case, fact), done in zip(asked, ask(engine, document.ids, [f for _, f in asked]), strict=True):
            logprobs = done.logprobs[:-1] if done.finish_reason is FinishReason.STOP else done.logprobs
            odds = [math.exp(p) for p in logprobs] or [0.0]
            answer, mean, least = done.text.strip(), sum(odds) / len(odds), min(odds)
            expected = fact.answer if case == "present" else ABSENT
            right = int(answer == expected)
            yield Row(kind, case, n, fact.question, expected, answer, right, round(mean, 5), round(least, 5))


def table(rows: list[Row]) -> str:
    right = [r for r in rows if r.correct]
    wrong = [r for r in rows if not r.correct]
    lines = ["| least probability below | wrong answers | right answers |", "|---|---|---|"]
    for threshold in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        shares = [
            sum(r.least_probability < threshold for r in group) / max(1, len(group))
            for group in (wrong, right)
        ]
        lines.append(f"| {threshold} | {shares[0]:.0%} | {shares[1]:.0%} |")
    return f"{len(right)} right answers, {len(wrong)} wrong ones\n\n" + "\n".join(lines)


def main(
    count: Annotated[int, typer.Option("--documents", help="Documents of each kind of text.")] = 20,
    length: Annotated[int, typer.Option(help="Tokens of a document.")] = 6000,
    model: Annotated[str | None, typer.Option(help="Checkpoint; the shipped one by default.")] = None,
) -> None:
    engine = load_engine(model)
    rows = [row for kind in ("code", "prose") for row in measure(engine, kind, count, length)]
    with ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    for kind in ("code", "prose"):
        print(f"{kind}: {table([r for r in rows if r.text == kind])}\n")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
