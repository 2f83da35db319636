"""RULER asked of a model that is no hybrid: by transformers, with attention to everything.

    python scripts/ask_original.py smollm2-135m --lengths 4K,8K --samples 5 -o runs/ruler/original
    python scripts/ask_original.py smollm2-135m --lengths 16K --stretch 2 -o runs/ruler/stretched

The questions, documents and scores are those of `opensala eval --suite ruler --questions 5` with the same
options, through the model's chat template. `--stretch` makes its contexts so many times longer by YaRN. A
document is read once for all questions about it. Results lie in the folder as those of `opensala eval` do,
and go on from there when they were broken off.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from opensala.bench.record import describe
from opensala.cli.sizes import token_count
from opensala.data.prompts import PromptFormat
from opensala.evaluate.original import Original
from opensala.evaluate.results import Results
from opensala.evaluate.ruler import RulerSuite
from opensala.evaluate.runner import sample_row
from opensala.hub import checkpoint_folder


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or name of a pulled model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "4K,8K",
    samples: Annotated[int, typer.Option(min=1, help="Questions of each task and length.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="Of each document.")] = 5,
    tasks: Annotated[str, typer.Option(help="Some of the thirteen.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    stretch: Annotated[float, typer.Option(min=1, help="How many times longer its contexts become.")] = 1,
) -> None:
    original = Original(checkpoint_folder(model), dtype, stretch)
    suite = RulerSuite(
        tuple(filter(None, tasks.split(","))),
        tuple(token_count(n, "--lengths") for n in lengths.split(",")),
        samples,
        questions,
    )
    circumstances = describe(torch.device("cpu")) | {"dtype": dtype}
    asked_of = {"model": model, "chat template": True, "stretch": stretch}
    results = Results(output, asked_of, {suite.name: suite.settings()}, circumstances)
    for group in suite.groups(PromptFormat(original.tokenizer)):
        if all(name in results for name in group.ids):
            continue
        asked = group.load()
        prompts, budgets = [list(one.prompt) for one in asked], [one.budget for one in asked]
        start = time.perf_counter()
        for sample, answer in zip(asked, original.answers(asked[0].id, prompts, budgets), strict=True):
            seconds, start = round(time.perf_counter() - start, 3), time.perf_counter()
            cost = {"new_tokens": answer.new_tokens, "read_tokens": answer.read_tokens, "seconds": seconds}
            if sample.id not in results:
                results.add(sample_row(suite.name, sample, answer.text) | cost)


if __name__ == "__main__":
    typer.run(main)
