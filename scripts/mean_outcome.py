"""Write the mean of the outcomes of a conversion and of one that went on from it.

python scripts/mean_outcome.py smollm2-135m first/outcome second/outcome mean --rank 24
"""

from pathlib import Path
from typing import Annotated

import typer

from opensala.convert.mean import mean_outcome
from opensala.convert.teacher import load_teacher


def main(
    teacher: Annotated[str, typer.Argument(help="What both were made of.")],
    first: Annotated[Path, typer.Argument(help="Folder of an outcome.")],
    second: Annotated[Path, typer.Argument(help="Folder of the one that went on from it.")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    share: Annotated[float, typer.Option(help="Of the second.")] = 0.5,
    rank: Annotated[int, typer.Option(min=1, help="Of the mean low-rank changes.")] = 16,
) -> None:
    kept = mean_outcome(load_teacher(teacher), first, second, output, share=share, rank=rank)
    print(f"low-rank changes of rank {rank} hold {kept:.1%} or more of their mean")


if __name__ == "__main__":
    typer.run(main)
