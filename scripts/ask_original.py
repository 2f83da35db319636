"""RULER asked of a model that is no hybrid: by transformers, with attention to everything.

    python scripts/ask_original.py smollm2-135m --lengths 4K,8K --samples 5 -o runs/ruler/original

The questions, documents and scores are those of `opensala eval --suite ruler --questions 5` with the same
options, through the model's chat template. A document is read once for all questions about it. Results lie in
the folder as those of `opensala eval` do, and go on from there when they were broken off.
"""

import copy
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from opensala.bench.record import describe
from opensala.cli.sizes import token_count
from opensala.data.prompts import PromptFormat
from opensala.engine.progress import token_progress
from opensala.evaluate.results import Results
from opensala.evaluate.ruler import RulerSuite
from opensala.evaluate.runner import sample_row
from opensala.evaluate.samples import Sample
from opensala.hub import checkpoint_folder

PIECE = 2048  # tokens read at a time


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, samples: list[Sample]) -> list[tuple[str, int, int]]:
    """Text, new tokens and read tokens of each; the beginning that all prompts share is read once."""
    prompts = [list(sample.prompt) for sample in samples]
    shared = min(len(os.path.commonprefix(prompts)), *(len(prompt) - 1 for prompt in prompts))
    cache: Any = DynamicCache()
    with token_progress(samples[0].id, shared) as advance:
        for first in range(0, shared, PIECE):
            part = prompts[0][first : min(first + PIECE, shared)]
            model.model(torch.tensor([part]), past_key_values=cache, use_cache=True)
            advance(len(part))
    found = []
    for n, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=samples[n].budget,
            do_sample=False,
        )[0, len(prompt) :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        found.append((text, len(out), len(prompt) - (shared if n else 0)))
    return found


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or name of a pulled model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "4K,8K",
    samples: Annotated[int, typer.Option(min=1, help="Questions of each task and length.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="Of each document.")] = 5,
    tasks: Annotated[str, typer.Option(help="Some of the thirteen.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    folder = str(checkpoint_folder(model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    suite = RulerSuite(
        tuple(filter(None, tasks.split(","))),
        tuple(token_count(n, "--lengths") for n in lengths.split(",")),
        samples,
        questions,
    )
    circumstances = describe(torch.device("cpu")) | {"dtype": dtype}
    results = Results(
        output, {"model": model, "chat template": True}, {suite.name: suite.settings()}, circumstances
    )
    for group in suite.groups(PromptFormat(tokenizer)):
        if all(name in results for name in group.ids):
            continue
        asked, start = group.load(), time.perf_counter()
        for sample, (text, new, read) in zip(asked, answers(other, tokenizer, asked), strict=True):
            seconds = round((time.perf_counter() - start) / len(asked), 3)
            cost = {"new_tokens": new, "read_tokens": read, "seconds": seconds}
            if sample.id not in results:
                results.add(sample_row(suite.name, sample, text) | cost)


if __name__ == "__main__":
    typer.run(main)
