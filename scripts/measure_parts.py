"""Where the time of reading a prompt goes: each native kernel timed, and the rest.

    python scripts/measure_parts.py --preset small --weights float32 --tokens 64K
    python scripts/measure_parts.py --preset 135m --weights float32,bfloat16 --tokens 8K

Random weights of a shape of `opensala bench speed`, a random prompt, read from its beginning to its end in
the engine's pieces; a short prompt before it warms up. The last line on stdout is JSON: a row for each part
with its seconds, one for the whole with its GFLOP/s by count.
"""

import time
from typing import Annotated, Any

import torch
import typer

from opensala.bench import counts
from opensala.bench.record import print_rows, significant
from opensala.bench.speed.contenders import Hybrid
from opensala.bench.speed.parts import by_part
from opensala.bench.speed.presets import Preset
from opensala.bench.speed.presets import preset as preset_of
from opensala.cli.sizes import token_count

WARM_UP = 512  # tokens


def measure(shapes: Preset, weights: str, tokens: int, search: str) -> list[dict[str, Any]]:
    """Rows of one model and prompt."""
    shapes.hybrid.block_search = search
    hybrid = Hybrid(shapes, weights, torch.device("cpu"))
    hybrid.start(min(WARM_UP, tokens), 4)
    hybrid.read(min(WARM_UP, tokens))
    hybrid.start(tokens, 4)
    used = time.process_time()
    parts = by_part(hybrid.parts(lambda: hybrid.read(tokens)))
    used, whole = time.process_time() - used, sum(parts.values())
    flops = counts.prefill_flops(shapes.hybrid, tokens)
    at = {"preset": shapes.name, "weights": weights, "tokens": tokens, "search": search}
    rows = [at | {"part": part, "seconds": significant(seconds)} for part, seconds in parts.items()]
    speed = {"gflops": significant(flops / whole / 1e9), "processor_seconds": significant(used)}
    return [*rows, at | {"part": "whole", "seconds": significant(whole)} | speed]


def main(
    preset: Annotated[str, typer.Option(help="A shape of `bench speed`.")] = "small",
    weights: Annotated[str, typer.Option(help="float32, bfloat16, int8, int4.")] = "float32",
    tokens: Annotated[str, typer.Option(help="Of the prompt.")] = "64K",
    search: Annotated[str, typer.Option(help="Of blocks: exact, hierarchical.")] = "exact",
) -> None:
    rows = []
    for form in weights.split(","):
        for how in search.split(","):
            rows += measure(preset_of(preset), form, token_count(tokens, "--tokens"), how)
    for row in rows:
        print(row, flush=True)
    print_rows(rows)


if __name__ == "__main__":
    typer.run(main)
