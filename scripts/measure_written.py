"""Measure how a model answers about values as people write them, and about facts that a text does not state.

    python scripts/measure_written.py --texts heldout.jsonl [--model MODEL] [--lengths 12K,24K,40K,60K]

Facts written by hand (benchmarks/written_facts.jsonl) are hidden as sentences in real texts, one kind of text
a document, and each is asked for on its own with the document read once; so are questions whose fact is
absent: about something else that resembles a stated fact (near), or about nothing the text speaks of (far).
Models with a chat template are asked in it, as `opensala ask` does. A document whose rows are there is not
read again: after a stop, give the same command again.

The texts are JSON lines of `text` and `group`, as `scripts/corpus/build.py` holds out. Rows go to
benchmarks/written.csv. A value is right if the answer is the hidden value, for models with a chat template
also if it stands in the answer's sentence; a fact counts as denied, or as absent, if the answer says so.
"""

import csv
import json
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from opensala.bench.record import append_rows
from opensala.cli.sizes import token_count
from opensala.data.conversations import insert
from opensala.data.facts import Fact
from opensala.data.heldout import texts_by_group
from opensala.data.prompts import PromptFormat
from opensala.engine import Engine, SamplingParams, load_engine
from opensala.engine.progress import token_progress

ROOT = Path(__file__).parents[1]
ROWS, FACTS = ROOT / "benchmarks" / "written.csv", ROOT / "benchmarks" / "written_facts.jsonl"
DENIALS = ("not found", "does not say", "not mentioned", "not stated", "no mention", "does not mention")
VALUES, PLAIN, ABSENT = 16, 4, 12  # questions about a document


def read_facts(path: Path = FACTS) -> dict[str, list[Fact]]:
    """The facts by how they are asked for; `kind` is the kind of value."""
    found: dict[str, list[Fact]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        fact = Fact(entry["statement"], entry["question"], entry["answer"], kind=entry["kind"])
        found[entry["asked"]].append(fact)
    return found


def read_groups(path: Path) -> dict[str, list[str]]:
    """Texts by kind, of kinds that have at least 50,000 characters."""
    groups = texts_by_group(path)
    return {name: texts for name, texts in groups.items() if sum(map(len, texts)) >= 50_000}


def taken(facts: list[Fact], count: int, turn: int) -> list[Fact]:
    """`count` facts, another part of the list at each turn."""
    return [facts[(turn * count + n) % len(facts)] for n in range(count)]


def chosen(facts: dict[str, list[Fact]], turn: int) -> tuple[list[Fact], list[tuple[str, Fact]]]:
    """The facts to hide in document `turn`, and all questions with how they are asked."""
    asked = [("readme", f) for f in taken(facts["readme"], VALUES // 2, turn)]
    asked += [("own words", f) for f in taken(facts["own words"], VALUES // 2, turn)]
    asked += [("plain", f) for f in taken(facts["plain"], PLAIN, turn)]
    hidden = [f for _, f in asked]
    asked += [("absent, near", f) for f in taken(facts["absent, near"], ABSENT // 2, turn)]
    asked += [("absent, far", f) for f in taken(facts["absent, far"], ABSENT // 2, turn)]
    return hidden, asked


def document(tokenizer: Any, texts: list[str], tokens: int, hidden: list[Fact], rng: random.Random) -> str:
    """About so many tokens of whole texts in a random order, repeated if they are too few, with sentences
    hidden in them."""
    sample = "\n\n".join(text[:4000] for text in texts)
    characters = int(tokens * len(sample) / len(tokenizer(sample, add_special_tokens=False)["input_ids"]))
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        parts += rng.sample(texts, len(texts))
    return insert(rng, "\n\n".join(parts)[:characters], [fact.statement for fact in hidden])


def judge(asked: str, fact: Fact, answer: str, chat: bool) -> tuple[bool, bool]:
    """Whether an answer is right, and whether it says that the text does not state the fact."""
    denied = any(words in answer.lower() for words in DENIALS)
    if asked.startswith("absent"):
        return denied, denied
    plain = answer.strip().rstrip(".")
    return plain == fact.answer.rstrip(".") or (chat and fact.answer.rstrip(".") in answer), denied


def measure(
    engine: Engine,
    groups: dict[str, list[str]],
    facts: dict[str, list[Fact]],
    lengths: list[int],
    count: int,
    known: set[tuple[int, str]],
) -> Iterator[dict[str, Any]]:
    """Rows of the documents that are not `known` by their length (of the first prompt) and kind of text."""
    form = PromptFormat(engine.tokenizer)
    for turn, length in enumerate(length for length in lengths for _ in range(count)):
        group = list(groups)[turn % len(groups)]
        rng = random.Random(f"{length} {turn}")
        hidden, asked = chosen(facts, turn)
        text = document(engine.tokenizer, groups[group], length, hidden, rng)
        prompts = [form.encode(form.question(text, fact.question)) for _, fact in asked]
        if (len(prompts[0]), group) in known:
            continue
        start = time.monotonic()
        with token_progress(f"{group} {length:,}", len(prompts[0])) as advance:
            limits = SamplingParams(max_tokens=32, stop=tuple(form.stop_strings))
            done = engine.generate(prompts, limits, on_read=advance)
        for (how, fact), completion in zip(asked, done, strict=True):
            answer = form.answer(completion.text)
            right, denied = judge(how, fact, answer, form.uses_chat)
            yield {
                "length": len(prompts[0]),
                "text": group,
                "asked": how,
                "kind": fact.kind,
                "question": fact.question,
                "expected": fact.answer,
                "answer": answer,
                "correct": int(right),
                "denied": int(denied),
                "seconds": round(time.monotonic() - start, 1),
            }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: right answers and denials by how the facts are asked for, and by kind of value."""
    lines = ["| asked | right | denied |", "|---|---:|---:|"]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        absent = row["asked"].startswith("absent")
        groups[row["asked"]].append(row)
        groups["absent, all" if absent else "stated, all"].append(row)
        if not absent and row["asked"] != "plain":
            groups["written values, all"].append(row)
            groups[row["kind"]].append(row)
    for name, found in groups.items():
        right, denied = (sum(int(row[key]) for row in found) for key in ("correct", "denied"))
        lines.append(
            f"| {name} | {right}/{len(found)} ({right / len(found):.0%}) | {denied / len(found):.0%} |"
        )
    return "\n".join(lines)


def main(
    texts: Annotated[Path, typer.Option(help="JSON lines of held-out texts: text, group.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint; the shipped one by default.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the documents.")] = "12K,24K,40K,60K",
    documents: Annotated[int, typer.Option(help="Documents of each length.")] = 2,
    name: Annotated[str, typer.Option(help="What the rows call the model.")] = "shipped",
    rows_file: Annotated[Path, typer.Option("--rows", help="Rows are added here.")] = ROWS,
) -> None:
    torch.set_flush_denormal(True)
    engine = load_engine(model)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    sizes = [token_count(part, "--lengths") for part in lengths.split(",")]
    rows: list[dict[str, Any]] = []
    if rows_file.exists():
        with rows_file.open(newline="", encoding="utf-8") as file:
            rows += [row for row in csv.DictReader(file) if row["model"] == name]
    known = {(int(row["length"]), row["text"]) for row in rows}
    for row in measure(engine, read_groups(texts), read_facts(), sizes, documents, known):
        rows.append({"model": name, "commit": commit, **row})
        append_rows(rows_file, list(rows[-1]), rows[-1:])
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
