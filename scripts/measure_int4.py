"""Products with weights in 4 bits on a CPU: ours, auto-round-lib's where it is installed, and torch's with
the weights in float32.

    python scripts/measure_int4.py [--shapes 1536x576,576x1536] [--rows 1,8,512]

Each shape (outputs x inputs, groups of 32) has as many weights as in the layers of a model, so that none is
still in a cache when its turn comes again; kernels take turns. Medians. The last line on stdout is JSON.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from opensala.bench.record import print_rows, significant
from opensala.model.auto_round import AutoRoundLinear, why_not
from opensala.model.quantised import QuantisedLinear
from opensala.ops.linear.gptq import Codes
from opensala.ops.linear.speed import half_product

GROUP = 32
MANY = 256  # rows from which weights written out in bfloat16 are timed too


def layer(outer: int, inner: int) -> QuantisedLinear:
    """A layer of random codes."""
    codes = torch.randint(0, 16, (outer, inner), dtype=torch.int32)
    scales = (torch.rand(outer, inner // GROUP) / inner**0.5 / 4).half().float()
    zeros = torch.full((outer, inner // GROUP), 8, dtype=torch.int32)
    return QuantisedLinear.of(
        Codes(codes, scales, zeros, torch.arange(inner) // GROUP), None, bits=4, group=GROUP
    )


def kernels(outer: int, inner: int, copies: int) -> dict[str, list[Callable[[torch.Tensor], torch.Tensor]]]:
    """Products by name, one for each copy of the weights."""
    plain = [layer(outer, inner) for _ in range(copies)]
    found: dict[str, list[Any]] = {"ours": list(plain)}
    if why_not() is None:
        found["auto-round-lib"] = [AutoRoundLinear(one) for one in plain]
    weights = [one.weights() for one in plain]
    found["float32"] = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]
    found["bfloat16"] = [lambda x, one=one: half_product(x, one.weights().bfloat16(), None) for one in plain]
    for one in plain:
        one.pack()
    return found


@torch.no_grad()
def measure(outer: int, inner: int, rows: list[int], copies: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one shape: milliseconds of a product."""
    works, found = kernels(outer, inner, copies), []
    for count in rows:
        x = torch.randn(count, inner)
        taken = {name: work for name, work in works.items() if name != "bfloat16" or count >= MANY}
        spent: dict[str, list[float]] = {name: [] for name in taken}
        for round_ in range(rounds + 1):
            for name, work in taken.items():
                start = time.perf_counter()
                for product in work:
                    product(x)
                if round_:  # the first one is the warm-up
                    spent[name].append((time.perf_counter() - start) / copies)
        at = {"shape": f"{outer}x{inner}", "rows": count}
        found += [
            at | {"kernel": name, "ms": significant(1e3 * statistics.median(seconds))}
            for name, seconds in spent.items()
        ]
    return found


def main(
    shapes: Annotated[str, typer.Option(help="Outputs x inputs.")] = "1536x576,576x1536,2048x2048",
    rows: Annotated[str, typer.Option(help="Rows of a product.")] = "1,8,512",
    copies: Annotated[int, typer.Option(min=1, help="Weights of each shape.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Turns.")] = 6,
) -> None:
    torch.manual_seed(0)
    found = []
    for shape in shapes.split(","):
        outer, inner = map(int, shape.split("x"))
        for row in measure(outer, inner, [int(n) for n in rows.split(",")], copies, rounds):
            found.append(row)
            print(row, flush=True)
    print_rows(found)


if __name__ == "__main__":
    typer.run(main)
