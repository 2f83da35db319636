"""What converting costs beside training from scratch, at the size of the `tiny` recipe: tokens and FLOPs
to the same loss.

    python scripts/measure_cost.py runs/cost --output benchmarks/cost.csv

A softmax Transformer is trained first; its cost counts for nobody, as that of a published model. Then it is
converted and trained on with several budgets, and the same hybrid is trained from random weights with several
budgets: the same data, each run with its own learning rates decayed to the end. The loss is that of the same
held-out sequences. Finished runs are not made again.
"""

import csv
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from opensala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.runs import read_json
from opensala.train.pipeline import SHIPPED, train
from opensala.train.plan import plan
from opensala.train.recipe import Halo, Recipe, Stage
from opensala.train.recipes import tiny
from opensala.train.schedule import Schedule
from opensala.train.start import Start

PEAK, LAST = 5e-3, 2e-4  # of every run that trains with the next-token loss
LENGTH = 256


@dataclass(frozen=True)
class Row:
    """One trained model. `loss` in nats per token of the held-out sequences; `flops` counts the conversion's
    teacher and all of its parts."""

    model: str
    seed: int
    conversion_tokens: int
    training_tokens: int
    flops: float
    loss: float


def training(tokens: int, seed: int, peak: float = PEAK) -> Recipe:
    """The hybrid trained on with the next-token loss."""
    recipe = replace(tiny(), seed=seed, save_every=1000, keep=1)
    stable = recipe.stage("stable")
    assert isinstance(stable, Stage)
    schedule = Schedule("linear", peak, LAST, warmup=10)
    return replace(recipe, stages=(replace(stable, tokens=tokens, schedule=schedule),))


def conversion(distilled: int, tokens: int, seed: int) -> Recipe:
    """The Transformer converted, `distilled` tokens of it by distillation, and trained on."""
    recipe, halo = training(tokens, seed, 3e-3), tiny().stage("halo")
    assert isinstance(halo, Halo)
    steps = max(1, distilled // (halo.config.distill.batch * LENGTH))
    config = replace(
        halo.config, distill=replace(halo.config.distill, steps=steps), save_every=1000, seed=seed
    )
    return replace(recipe, stages=(Halo(config), *recipe.stages))


def transformer(tokens: int) -> Recipe:
    """The softmax Transformer to convert."""
    recipe = replace(tiny(), save_every=1000, keep=1)
    dense = recipe.stage("dense")
    assert isinstance(dense, Stage)
    return replace(
        recipe, stages=(replace(dense, tokens=tokens, schedule=Schedule("linear", PEAK, LAST, warmup=10)),)
    )


def untrained(folder: Path, seed: int) -> Path:
    """The hybrid with random weights, as a checkpoint."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**tiny().model)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


def finished(recipe: Recipe, folder: Path, start: Start) -> dict[str, dict[str, float]]:
    """Losses before and after each stage, of a run that is made or gone on with if need be."""
    train(recipe, folder, start=start, resume=(folder / "config.json").exists(), device="cpu", quiet=True)
    losses = read_json(folder / "stages.json")
    assert losses is not None
    return losses


def row(model: str, seed: int, recipe: Recipe, loss: float, stages: int, teacher: str = "") -> Row:
    """A row for the first `stages` stages of a recipe."""
    parts = plan(recipe, 1, "h100", 0.4, teacher)[:stages]
    tokens = [part.tokens for part in parts]
    halo = isinstance(recipe.stages[0], Halo)
    return Row(
        model,
        seed,
        tokens[0] if halo else 0,
        sum(tokens[halo:]),
        sum(part.flops for part in parts),
        loss,
    )


def main(
    folder: Annotated[Path, typer.Argument(help="where the runs go")],
    output: Path = Path("benchmarks/cost.csv"),
    dense: Annotated[int, typer.Option(help="tokens of the Transformer")] = 1_500_000,
    scratch: Annotated[
        str, typer.Option(help="tokens of the runs from scratch")
    ] = "250000,500000,1000000,1500000",
    converted: Annotated[str, typer.Option(help="tokens of distillation + tokens after it")] = (
        "61440+61440,122880+122880,245760+245760"
    ),
    seeds: int = 1,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    rows = []

    def note(found: Row) -> None:
        rows.append(found)
        print(
            f"{found.model:12} seed {found.seed}  "
            f"{found.conversion_tokens + found.training_tokens:9,} tokens  "
            f"{found.flops:.3g} FLOPs  loss {found.loss:.4f}",
            flush=True,
        )
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(found)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(one) for one in rows)

    recipe = transformer(dense)
    losses = finished(recipe, folder / "transformer", Start())
    note(row("transformer", 0, recipe, losses["dense"]["after"], 1))
    teacher = str(folder / "transformer" / "models" / "dense")
    for seed in range(seeds):
        for budget in converted.split(","):
            distilled, after = map(int, budget.split("+"))
            recipe = conversion(distilled, after, seed)
            losses = finished(recipe, folder / f"converted-{budget}-{seed}", Start(teacher=teacher))
            note(row("converted", seed, recipe, losses["stable"]["before"], 1, teacher))
            note(row("converted", seed, recipe, losses["stable"]["after"], 2, teacher))
        for tokens in map(int, scratch.split(",")):
            recipe = training(tokens, seed)
            start = Start(init=str(untrained(folder / f"untrained-{seed}", seed)))
            losses = finished(recipe, folder / f"scratch-{tokens}-{seed}", start)
            note(row("scratch", seed, recipe, losses["stable"]["after"], 1))


if __name__ == "__main__":
    typer.run(main)
