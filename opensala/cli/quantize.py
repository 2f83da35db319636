"""`opensala quantize`: a checkpoint in 4 or 8 bits. Parsing only."""

import json
from typing import Annotated

import typer

from .options import Json, Quiet

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder or hub name of a MiniCPM-SALA checkpoint, or name of a pulled one. Default: the small "
        "model that ships here.",
    ),
]
Kinds = Annotated[
    str,
    typer.Option(
        help="Which linear layers, separated by commas: feed-forward, attention, lightning, state, gates, "
        "head. What is not named, the embedding and norms stay as they are."
    ),
]


def quantize(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the new checkpoint.")],
    model: Source = None,
    bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Weights of a row that share a scale; -1 for the whole row.")
    ] = 128,
    kinds: Kinds = "feed-forward,attention,lightning",
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of each of them.")] = 1024,
    questions: Annotated[
        int, typer.Option(help="Questions about hidden facts, before and after; 0 for none.")
    ] = 24,
    document_tokens: Annotated[int, typer.Option(help="Tokens of the documents they are about.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the calibration text.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint with weights in 4 or 8 bits (GPTQ), and report what that cost."""
    from ..quantize import Plan, quantise_checkpoint

    names = tuple(name.strip() for name in kinds.split(",") if name.strip())
    plan = Plan(model, bits, group_size, names, sequences, length, questions, document_tokens, seed)
    report = quantise_checkpoint(plan, output, quiet)
    print(json.dumps(report) if as_json else output)
