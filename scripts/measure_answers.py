"""What a converted model says, beside its teacher: instructions and questions, all shown, and a choice among
four endings of a sentence, counted.

    python scripts/measure_answers.py MODEL... --heldout heldout.jsonl [--parts choices,questions]

Questions are about the beginnings of held-out documents, in the chat format, answered greedily. A choice: of
four endings, the true one and three of other sentences of the same document, the one that is likeliest per
token behind the text before. Rows go to benchmarks/real_answers.csv.
"""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from opensala.bench.record import append_rows
from opensala.data.conversations import sentences
from opensala.hub import checkpoint_folder

ROWS = Path(__file__).parents[1] / "benchmarks" / "real_answers.csv"
FIELDS = ("model", "part", "asked", "expected", "answer", "right", "tokens", "date")
INSTRUCTIONS = (
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "Name three colours.",
    "Translate 'good morning' into Spanish.",
    "Explain in two sentences why the sky is blue.",
    "Write a short email that asks a colleague for a meeting on Monday.",
    "List four things to take on a hiking trip.",
    "Rewrite this sentence politely: Give me the report now.",
    "What is 7 plus 5?",
    "Give me a title for a story about a lost dog.",
)
# Title of a held-out document, what is asked about its first tokens, what a right answer says.
QUESTIONS = (
    ("us-constitution", "How old must a person be to become a Representative?", "twenty five"),
    ("us-constitution", "Who has the power to choose the Members of the House of Representatives?", "People"),
    ("coalition ships.txt", "What does the Hulk become when its side pods are removed?", "Spindle"),
    ("ch-docs.html", "How should manual pages be compressed when they are installed?", "gzip -9"),
    (
        "security-bugs.html",
        "At which email address can the Linux kernel security team be contacted?",
        "security@",
    ),
    ("network-server-list.page", "In which format does Nautilus store the list of servers?", "XBEL"),
    ("xmaxima.info.gz", "In which language is Xmaxima written?", "Tcl/Tk"),
    ("sect.apt-cache.html", "Which command searches for packages by keyword?", "apt-cache search"),
    ("skills.txt", "Which weapons are most effective at stabbing helpless foes?", "Short Blades"),
    ("modulefinder.html", "Which class does the module modulefinder provide?", "ModuleFinder"),
)
DOCUMENT_TOKENS, NEW_TOKENS = 1500, 48
CONTEXT_CHARACTERS, ENDINGS = 800, 4


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def say(model: Any, tokenizer: Any, content: str) -> str:
    """The greedy answer to a message."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def beginning(tokenizer: Any, text: str) -> str:
    """The first tokens of a document, as text."""
    ids = tokenizer(text[: 8 * DOCUMENT_TOKENS], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[:DOCUMENT_TOKENS])


def choices(documents: list[dict[str, str]], count: int) -> Iterator[tuple[str, list[str]]]:
    """Text before and half a sentence, and four endings, the true one first."""
    rng = random.Random(1)
    usable = [d["text"] for d in documents if len(sentences(d["text"])) >= 2 * ENDINGS]
    for n in range(count):
        text = usable[n % len(usable)]
        known = [s for s in sentences(text) if len(s.split()) >= 8]
        first, *others = rng.sample(known, ENDINGS)
        words = first.split()
        half = len(words) // 2
        at = text.index(first)
        before = text[max(0, at - CONTEXT_CHARACTERS) : at] + " ".join(words[:half])
        rests = [" ".join(s.split()[len(s.split()) // 2 :]) for s in others]
        yield before, [" ".join(words[half:]), *rests]


@torch.inference_mode()
def likelihood(model: Any, tokenizer: Any, before: str, ending: str) -> float:
    """Mean log-probability of an ending's tokens."""
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    tail = tokenizer(f" {ending}", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([head + tail])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(head) - 1 : -1]
    found = logits.float().log_softmax(-1).gather(1, ids[0, len(head) :, None])
    return float(found.mean())


def rows_of(
    name: str, model: Any, tokenizer: Any, documents: list[dict[str, str]], parts: list[str], count: int
) -> Iterator[dict[str, Any]]:
    common = {"model": name, "date": time.strftime("%Y-%m-%d")}
    if "instructions" in parts:
        for content in INSTRUCTIONS:
            answer = say(model, tokenizer, content)
            yield {**common, "part": "instructions", "asked": content, "answer": answer}
    if "questions" in parts:
        texts = {d["title"]: d["text"] for d in documents}
        for title, question, expected in QUESTIONS:
            answer = say(model, tokenizer, f"{beginning(tokenizer, texts[title])}\n\n{question}")
            right = int(expected in answer)
            yield {
                **common,
                "part": "questions",
                "asked": f"{title}: {question}",
                "expected": expected,
                "answer": answer,
                "right": right,
                "tokens": DOCUMENT_TOKENS,
            }
    if "choices" in parts:
        for before, endings in choices(documents, count):
            scores = [likelihood(model, tokenizer, before, ending) for ending in endings]
            chosen = scores.index(max(scores))
            yield {
                **common,
                "part": "choices",
                "asked": before[-60:],
                "expected": endings[0][:60],
                "answer": endings[chosen][:60],
                "right": int(chosen == 0),
            }


def main(
    models: Annotated[list[str], typer.Argument(help="Folders or pulled models; rows name them so.")],
    heldout: Annotated[Path, typer.Option(help="JSON lines of held-out documents: text, title.")],
    parts: str = "instructions,questions,choices",
    count: Annotated[int, typer.Option(help="Sentences to end.")] = 60,
    rows: Annotated[Path, typer.Option(help="Rows are added here.")] = ROWS,
) -> None:
    import opensala  # noqa: F401 -- registers the model type

    torch.set_flush_denormal(True)
    documents = read(heldout)
    for name in models:
        folder = checkpoint_folder(name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        right: dict[str, list[int]] = {}
        for row in rows_of(name, model, tokenizer, documents, parts.split(","), count):
            append_rows(rows, FIELDS, [row])
            right.setdefault(row["part"], []).append(row.get("right", 0))
        print(name, {part: f"{sum(found)}/{len(found)}" for part, found in right.items()}, flush=True)


if __name__ == "__main__":
    typer.run(main)
