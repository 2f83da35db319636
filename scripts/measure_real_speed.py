"""Time a converted model beside its teacher by length: time to the first token, decoding, size of the cache.

    python scripts/measure_real_speed.py STUDENT --teacher TEACHER --text novel.txt --lengths 2K,4K,8K
    python scripts/measure_real_speed.py STUDENT --teacher TEACHER --text novel.txt --lengths 32K --layers 6

Both read the same text in one process, one after the other, in float32. The teacher reads it in one call
with torch's scaled_dot_product_attention, the fastest way there is for it here. Its layers cost the same, so
with `--layers N` only one and then N of them are run, and each further layer counts as much as the mean of
those between. Seconds are of processor time with `--clock processor`, for machines that do other work too:
run it with one thread then. Rows go to benchmarks/real_speed.csv.
"""

import csv
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from opensala.bench.twin import TwinTiming, time_twin
from opensala.engine import Engine, SamplingParams, generate, load_engine
from opensala.hub import checkpoint_folder

ROWS = Path(__file__).parents[1] / "benchmarks" / "real_speed.csv"
NEW_TOKENS = 17
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Row:
    """One model at one length. `layers`: how many of the teacher's were run; 0 means all of a hybrid's."""

    model: str
    tokens: int
    layers: int
    seconds_to_first_token: float
    decode_tokens_per_second: float
    cache_bytes: int
    dtype: str
    clock: str
    threads: int
    torch: str
    date: str


def row(model: str, tokens: int, layers: int, timing: TwinTiming, dtype: str, clock: str) -> Row:
    return Row(
        model,
        tokens,
        layers,
        round(timing.time_to_first_token, 3),
        round(timing.decode_tokens_per_second, 2),
        timing.cache_bytes,
        dtype,
        clock,
        torch.get_num_threads(),
        torch.__version__,
        time.strftime("%Y-%m-%d"),
    )


def time_hybrid(engine: Engine, ids: list[int], clock: Callable[[], float]) -> TwinTiming:
    """Through the engine, nothing of the text known beforehand."""
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    came = [clock()]
    done = generate(engine, ids, params, quiet=True, on_event=lambda _: came.append(clock()))
    start, first, *_, last = came
    return TwinTiming(first - start, (NEW_TOKENS - 1) / (last - first), done.cache_bytes)


def time_teacher(model: Any, ids: list[int], layers: int, clock: Callable[[], float]) -> TwinTiming:
    """With `layers` of its layers, and what all of them would take."""
    every, tokens = model.model.layers, torch.tensor([ids])
    count = len(every)
    if layers >= count:
        return time_twin(model, tokens, NEW_TOKENS - 1, clock=clock)
    found = []
    for number in (1, layers):
        model.model.layers = every[:number]
        model.config.num_hidden_layers = number
        found.append(time_twin(model, tokens, NEW_TOKENS - 1, clock=clock))
    model.model.layers, model.config.num_hidden_layers = every, count
    few, many = found
    share = (count - layers) / (layers - 1)  # of the difference, to be added
    first = many.time_to_first_token + share * (many.time_to_first_token - few.time_to_first_token)
    step = 1 / many.decode_tokens_per_second
    step += share * (step - 1 / few.decode_tokens_per_second)
    return TwinTiming(first, 1 / step, many.cache_bytes * count // layers)


def main(
    student: Annotated[str, typer.Argument(help="The hybrid: a folder, or a pulled model.")],
    teacher: Annotated[str, typer.Option(help="The model it was made from: a folder, or a pulled one.")],
    text: Annotated[Path, typer.Option(help="A long text.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "2K,4K,8K",
    layers: Annotated[int, typer.Option(min=2, help="Layers of the teacher that are run.")] = 1000,
    dtypes: Annotated[str, typer.Option(help="Of the teacher; empty for the hybrid alone.")] = "float32",
    clock: Annotated[str, typer.Option(help="wall, or processor.")] = "wall",
    rows: Annotated[Path, typer.Option(help="Rows are added here.")] = ROWS,
) -> None:
    if clock not in CLOCKS:
        raise typer.BadParameter(f"--clock must be one of {', '.join(CLOCKS)}, got {clock!r}")
    torch.set_flush_denormal(True)
    now = CLOCKS[clock]
    teacher = str(checkpoint_folder(teacher))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    all_ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    models = {
        name: AutoModelForCausalLM.from_pretrained(teacher, dtype=getattr(torch, name)).eval()
        for name in filter(None, dtypes.split(","))
    }
    engine = load_engine(student)
    time_hybrid(engine, all_ids[:600], now)  # compiled, warm
    for model in models.values():
        time_teacher(model, all_ids[:300], 1000, now)
    for part in lengths.split(","):
        tokens = int(part[:-1]) * 1024 if part.endswith("K") else int(part)
        ids = all_ids[-tokens:]
        found = [row("hybrid", tokens, 0, time_hybrid(engine, ids, now), "float32", clock)]
        for name, model in models.items():
            number = min(layers, len(model.model.layers))
            found.append(row("teacher", tokens, number, time_teacher(model, ids, number, now), name, clock))
        new = not rows.exists()
        with rows.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
            if new:
                writer.writeheader()
            writer.writerows(map(asdict, found))
        for one in found:
            print(one, flush=True)


if __name__ == "__main__":
    typer.run(main)
