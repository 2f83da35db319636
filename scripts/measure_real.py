"""Measure a converted model beside its teacher: held-out perplexity by kind of text, numbers hidden in
real prose.

    python scripts/measure_real.py STUDENT --teacher TEACHER --heldout heldout.jsonl --lengths 1K,4K

The held-out file has a line for each document: {"text": ..., "group": ...}. Both models read the same
windows and are asked the same questions, in the teacher's chat format. Rows are added to benchmarks/real.csv.
"""

import math
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from opensala.bench.record import append_rows
from opensala.cli.sizes import token_count
from opensala.data.heldout import texts_by_group
from opensala.engine import Engine, EngineOptions, SamplingParams

ROWS = Path(__file__).parents[1] / "benchmarks" / "real.csv"
THINGS = (
    "violet harbor",
    "copper lantern",
    "quiet meadow",
    "silver anchor",
    "amber valley",
    "winter orchard",
)
ANSWER_TOKENS = 12
Prompt = tuple[list[int], str]  # token ids, the number that answers


def windows(tokenizer: Any, heldout: Path, length: int, each: int) -> dict[str, list[list[int]]]:
    """Up to `each` pieces of `length` tokens for every kind of text, one per document, the longest first."""
    pieces: dict[str, list[list[int]]] = {}
    for kind, texts in texts_by_group(heldout).items():
        texts.sort(key=len, reverse=True)
        ids = (tokenizer(text[: 8 * length], add_special_tokens=False)["input_ids"] for text in texts[:each])
        pieces[kind] = [x[:length] for x in ids if len(x) >= length]
    return {kind: found for kind, found in pieces.items() if found}


@torch.inference_mode()
def loss(model: Any, ids: list[int]) -> float:
    """Mean negative log-likelihood of a window, nats per token."""
    tokens = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    parts = [
        torch.nn.functional.cross_entropy(a.float(), b, reduction="sum")
        for a, b in zip(logits[:-1].split(512), tokens[0, 1:].split(512), strict=True)
    ]
    return float(sum(parts)) / (len(ids) - 1)


def needle_prompt(tokenizer: Any, text: list[int], tokens: int, depth: float, seed: int) -> Prompt:
    """A chat of `tokens` tokens: prose with a hidden number, a question, the beginning of its answer."""
    rng = random.Random(seed)
    thing, number = rng.choice(THINGS), str(rng.randrange(1_000_000, 10_000_000))
    encode = lambda s: tokenizer(s, add_special_tokens=False)["input_ids"]  # noqa: E731
    before, after = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
    ).split("\0")
    question = f"\n\nWhat is the special magic number for the {thing} mentioned in the text above?"
    begun = f"The special magic number for the {thing} mentioned in the text is"
    head, tail = encode(before), encode(question + after + begun)
    needle = encode(f" The special magic number for the {thing} is {number}. ")
    room = tokens - len(head) - len(tail) - len(needle)
    start = rng.randrange(max(1, len(text) - room))
    prose = text[start : start + room]
    place = int(depth * len(prose))
    return head + prose[:place] + needle + prose[place:] + tail, number


def haystack(pieces: dict[str, list[list[int]]]) -> list[int]:
    """All prose of the held-out windows, one behind the other."""
    return [token for found in pieces.values() for ids in found for token in ids]


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: list[Prompt]) -> list[bool]:
    """Whether each number was found: by the engine for a hybrid, by transformers for its teacher."""
    if model.config.model_type == "minicpm_sala":
        longest = max(len(ids) for ids, _ in prompts)
        room = EngineOptions(max_running=1, max_cached_tokens=longest + 1024, snapshot_interval=0)
        engine = Engine(model, tokenizer, room)
        texts = []
        for ids, _ in prompts:
            texts.append(engine.generate([ids], SamplingParams(max_tokens=ANSWER_TOKENS))[0].text)
    else:
        texts = []
        for ids, _ in prompts:
            tokens = torch.tensor([ids], device=model.device)
            out = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
            )
            texts.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return [number in text.replace(",", "") for text, (_, number) in zip(texts, prompts, strict=True)]


def load(folder: str, device: str, dtype: torch.dtype) -> Any:
    import opensala  # noqa: F401 -- registers the model type

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def note(row: dict[str, Any], rows: Path) -> None:
    """Print a row and add it to the file."""
    print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    columns = ["model", "what", "kind", "tokens", "count", "figure", "seconds", "device", "dtype", "date"]
    append_rows(rows, columns, [row])


def main(
    student: Annotated[str, typer.Argument(help="Folder of the converted model.")],
    teacher: Annotated[str, typer.Option(help="Folder of the model it was made from.")],
    heldout: Annotated[Path, typer.Option(help="JSON lines of held-out documents: text, group.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts with a hidden number.")] = "1K,4K,8K",
    samples: Annotated[int, typer.Option(help="Hidden numbers per length.")] = 20,
    each: Annotated[int, typer.Option(help="Windows of 2,048 tokens per kind of text.")] = 8,
    teacher_most: Annotated[int, typer.Option(help="Tokens up to which the teacher is asked.")] = 8192,
    rows: Annotated[Path, typer.Option(help="Rows are added here.")] = ROWS,
) -> None:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    pieces = windows(tokenizer, heldout, 2048, each)
    prose = haystack(windows(tokenizer, heldout, 16384, 64))
    common = {"device": device, "dtype": str(dtype).removeprefix("torch."), "date": time.strftime("%Y-%m-%d")}
    for name, folder in (("student", student), ("teacher", teacher)):
        model = load(folder, device, dtype)
        means = {}
        for kind, found in pieces.items():
            start = time.perf_counter()
            means[kind] = sum(loss(model, ids) for ids in found) / len(found)
            figure = {"figure": round(means[kind], 4), "seconds": round(time.perf_counter() - start, 1)}
            note(
                {
                    "model": name,
                    "what": "loss",
                    "kind": kind,
                    "tokens": 2048,
                    "count": len(found),
                    **figure,
                    **common,
                },
                rows,
            )
        mean = sum(means.values()) / len(means)
        print(f"{name}: mean loss {mean:.4f}, perplexity {math.exp(mean):.2f}", flush=True)
        for text in lengths.split(","):
            tokens = token_count(text, "--lengths")
            if name == "teacher" and tokens > teacher_most:
                continue
            prompts = [
                needle_prompt(tokenizer, prose, tokens, (i + 0.5) / samples, seed=1000 * tokens + i)
                for i in range(samples)
            ]
            start = time.perf_counter()
            right = answers(model, tokenizer, prompts)
            figure = {"figure": sum(right) / samples, "seconds": round(time.perf_counter() - start, 1)}
            note(
                {
                    "model": name,
                    "what": "needle",
                    "kind": "prose",
                    "tokens": tokens,
                    "count": samples,
                    **figure,
                    **common,
                },
                rows,
            )
        del model
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
