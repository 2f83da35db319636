"""Measure again every figure of speed in README and docs, one process after the other, unattended.

    python scripts/reproduce_speed.py runs/figures
    python scripts/reproduce_speed.py runs/figures --list
    python scripts/reproduce_speed.py runs/figures --only ops,engine
    python scripts/reproduce_speed.py runs/figures-smoke --smoke

At the end DIR/figures.md and DIR/figures.csv have each figure as a document states it beside the value just
measured; the figures, and where each comes from, are in benchmarks/figures.toml. A finished step is not run
again (but with --again): give the same command after a stop. A step that cannot run here is left out with
what is to be done; one that fails is recorded, the next one goes on, and the exit code is 1. Nothing else
should run on the machine meanwhile. `--write` then puts the figures into the documents and the registry: the
numbers, not what sentences conclude from them. `--smoke` takes the same steps at tiny sizes, in some minutes.
"""

from pathlib import Path
from typing import Annotated

import typer

from opensala.bench.figures.run import Options, listing, run, stderr


def main(
    directory: Annotated[Path, typer.Argument(help="Folder of the whole run.")],
    only: Annotated[str, typer.Option(help="Names of steps, separated by commas.")] = "",
    list_steps: Annotated[bool, typer.Option("--list", help="Say what would be run.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run finished steps again.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes: no figure means anything.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, for steps that take all.")] = 2,
    gguf: Annotated[str, typer.Option(help="SmolLM2-135M-Instruct.Q4_1.gguf, for two steps.")] = "",
    write: Annotated[bool, typer.Option("--write", help="Then put the figures into the documents.")] = False,
) -> None:
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    file = str(Path(gguf).resolve()) if gguf else ""
    options = Options(directory, names, again, smoke, threads, file, write)
    try:
        if list_steps:
            print(listing(options))
            return
        well = run(options, stderr)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print((directory / "figures.md").read_text(encoding="utf-8"), end="")
    raise typer.Exit(0 if well else 1)


if __name__ == "__main__":
    typer.run(main)
