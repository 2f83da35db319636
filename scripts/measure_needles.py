"""Ask a model with a chat template for numbers hidden in real prose, each alone or several in one text.

    python scripts/measure_needles.py MODEL --heldout heldout.jsonl --lengths 16K,32K --numbers 5 --alone
    python scripts/measure_needles.py MODEL --heldout heldout.jsonl --lengths 4K,16K --texts 2 --numbers 5

Every number stands in a sentence of its own ("The special magic number for the violet harbor is 4718203.")
and is asked for in the chat format, with the answer begun. Together, all numbers of a text stand in it at
spread depths, each with the others as distractors; alone, each has a copy of the text to itself. What
prompts have in common is read once. A model of another kind than ours is asked through transformers, with
`--stretch` beyond its own positions. The held-out file has a line for each document: {"text": ...,
"group": ...}. Rows, a line for each number, go to benchmarks/needles.csv.
"""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig

from opensala.bench.record import append_rows
from opensala.cli.sizes import token_count
from opensala.data.heldout import texts_by_group
from opensala.data.prompts import PromptFormat
from opensala.engine import EngineOptions, SamplingParams, load_engine
from opensala.engine.progress import token_progress
from opensala.evaluate.original import Original
from opensala.hub import checkpoint_folder

ROWS = Path(__file__).parents[1] / "benchmarks" / "needles.csv"
THINGS = (
    "violet harbor",
    "copper lantern",
    "quiet meadow",
    "silver anchor",
    "amber valley",
    "winter orchard",
)
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        text: counts the texts of a length.
        hidden: numbers that the text holds.
        depth: 0 at the text's beginning, 1 at its end.
        seconds: for all questions of the text.
    """

    model: str
    kv_dtype: str
    tokens: int
    text: int
    hidden: int
    depth: float
    thing: str
    number: str
    answer: str
    found: int
    seconds: float
    date: str


def prose_of(tokenizer: Any, heldout: Path, tokens: int) -> list[int]:
    """The held-out documents as tokens, the longest first, at most so many of each."""
    texts = sorted((t for group in texts_by_group(heldout).values() for t in group), key=len, reverse=True)
    pieces = (tokenizer(text[: 8 * tokens], add_special_tokens=False)["input_ids"] for text in texts)
    found: list[int] = []
    for piece in pieces:
        found += piece[:tokens]
        if len(found) >= 4 * tokens:
            break
    return found


def prompts_of(
    form: PromptFormat, prose: list[int], tokens: int, count: int, rng: random.Random, alone: bool
) -> list[tuple[list[int], str, str, float]]:
    """Prompts of about `tokens` tokens, the deepest number first: ids, thing, number, depth of each."""
    encode = lambda s: form.tokenizer(s, add_special_tokens=False)["input_ids"]  # noqa: E731
    before, after = form.messages([{"role": "user", "content": "\0"}]).split("\0")
    things = rng.sample(THINGS, count)
    numbers = [str(rng.randrange(1_000_000, 10_000_000)) for _ in things]
    needles = [
        encode(f" The special magic number for the {thing} is {number}. ")
        for thing, number in zip(things, numbers, strict=True)
    ]
    asked = [
        encode(
            f"\n\nWhat is the special magic number for the {thing} mentioned in the text above?{after}"
            f"The special magic number for the {thing} mentioned in the text is"
        )
        for thing in things
    ]
    room = tokens - len(encode(before)) - len(asked[0]) - sum(map(len, needles))
    start = rng.randrange(max(1, len(prose) - room))
    text = prose[start : start + room]
    depths = [(n + 0.5) / count for n in range(count)]
    found = []
    for n in reversed(range(count)):
        document, end = list(encode(before)), 0
        for m in (n,) if alone else range(count):
            cut = int(depths[m] * len(text))
            document += text[end:cut] + needles[m]
            end = cut
        found.append((document + text[end:] + asked[n], things[n], numbers[n], depths[n]))
    return found


def asker(
    model: str, kv_dtype: str, stretch: float
) -> tuple[Any, str, Callable[[str, list[list[int]]], list[str]]]:
    """The tokenizer of a model, how its keys and values are kept, and how to have prompts answered by it: a
    label and ids give texts."""
    folder = checkpoint_folder(model)
    if AutoConfig.from_pretrained(str(folder)).model_type != "minicpm_sala":
        if kv_dtype != "auto":
            raise typer.BadParameter(f"--kv-dtype is for hybrids: {model} is none")
        original = Original(folder, stretch=stretch)

        def ask_original(label: str, prompts: list[list[int]]) -> list[str]:
            return [one.text for one in original.answers(label, prompts, [ANSWER_TOKENS] * len(prompts))]

        return original.tokenizer, kv_dtype, ask_original
    if stretch != 1:
        raise typer.BadParameter(f"--stretch is for models with rotary positions alone: {model} is a hybrid")
    engine = load_engine(model, options=EngineOptions(kv_dtype=kv_dtype))

    def ask(label: str, prompts: list[list[int]]) -> list[str]:
        with token_progress(label, sum(map(len, prompts))) as advance:
            limits = SamplingParams(max_tokens=ANSWER_TOKENS)
            return [done.text for done in engine.generate(prompts, limits, on_read=advance)]

    return engine.tokenizer, engine.options.kv_dtype, ask


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or name of a pulled model.")],
    heldout: Annotated[Path, typer.Option(help="JSON lines of held-out documents: text.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "16K,32K",
    texts: Annotated[int, typer.Option(min=1, help="Texts of each length.")] = 2,
    numbers: Annotated[int, typer.Option(min=1, max=len(THINGS), help="Numbers of each text.")] = 5,
    alone: Annotated[bool, typer.Option("--alone", help="Each in a copy of its text.")] = False,
    kv_dtype: Annotated[
        str, typer.Option(help="Of keys and values: auto, float32, bfloat16, int8.")
    ] = "auto",
    stretch: Annotated[
        float, typer.Option(min=1, help="How many times longer an original's contexts become, by YaRN.")
    ] = 1,
    rows: Annotated[Path, typer.Option(help="Rows are added here.")] = ROWS,
) -> None:
    torch.set_flush_denormal(True)
    sizes = [token_count(part, "--lengths") for part in lengths.split(",")]
    tokenizer, kept, ask = asker(model, kv_dtype, stretch)
    form = PromptFormat(tokenizer, chat=True)
    name = model if stretch == 1 else f"{model}, YaRN x {stretch:g}"
    for tokens in sizes:
        right, prose = 0, prose_of(tokenizer, heldout, tokens)  # the same whatever else is measured
        for text in range(texts):
            asked = prompts_of(form, prose, tokens, numbers, random.Random(f"{tokens} {text}"), alone)
            start = time.monotonic()
            answers = ask(f"{tokens:,}, text {text + 1}", [ids for ids, *_ in asked])
            seconds = round(time.monotonic() - start, 1)
            made = []
            for (ids, thing, number, depth), answer in zip(asked, answers, strict=True):
                found = int(number in answer.replace(",", ""))
                hidden, today = 1 if alone else numbers, time.strftime("%Y-%m-%d")
                found_in = (thing, number, answer.strip(), found, seconds, today)
                made.append(asdict(Row(name, kept, len(ids), text, hidden, depth, *found_in)))
                right += found
            append_rows(rows, list(Row.__dataclass_fields__), made)
        print(f"{name}, kv_dtype {kept}, {tokens:,} tokens: {right} of {texts * numbers}", flush=True)


if __name__ == "__main__":
    typer.run(main)
