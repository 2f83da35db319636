"""Time a converted model beside its teacher by length: time to the first token, decoding, size of the cache.

    python scripts/measure_real_speed.py STUDENT --teacher TEACHER --text novel.txt --lengths 2K,4K,8K
    python scripts/measure_real_speed.py STUDENT --teacher TEACHER --text novel.txt --lengths 32K --layers 6

Both read the same text in one process, one after the other, each in every precision that is asked for: `auto`
of the hybrid is what `opensala ask` takes on this machine (16-bit products where they are faster, keys and
values as the checkpoint is), and `+float32`, `+bfloat16` and `+int8` say how keys and values are kept. The
teacher reads in one call with torch's scaled_dot_product_attention, the fastest way there is for it here. Its
layers cost the same, so with `--layers N` only one and then N of them are run, and each further layer counts
as much as the mean of those between. Seconds are of processor time with `--clock processor`, for machines
that do other work too: run it with one thread then. Without --text the sources of the Python installation are
read: what a text says changes no time. Rows go to benchmarks/real_speed.csv; the last line on stdout is JSON.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from opensala.bench.record import append_rows, print_rows
from opensala.bench.twin import TwinTiming, time_layers
from opensala.cli.sizes import token_count
from opensala.data.text import long_document
from opensala.engine import Engine, EngineOptions, SamplingParams, generate, load_engine
from opensala.hub import checkpoint_folder

ROWS = Path(__file__).parents[1] / "benchmarks" / "real_speed.csv"
NEW_TOKENS = 17
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Row:
    """One model at one length.

    Attributes:
        model: `hybrid` or `teacher`; `hybrid, first` is the one that shipped until 2026-11-27.
        layers: how many of the teacher's were run; 0 means all of a hybrid's.
        dtype: of the teacher; of a hybrid as `--hybrids` names it (`auto` alone kept keys and values in
            float32 until 2026-11-27).
    """

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


@contextmanager
def cores() -> Iterator[None]:
    """Says how many cores this process had while it was timed: fewer than its threads, and others ran too."""
    wall, own = time.perf_counter(), time.process_time()
    yield
    wall, own = time.perf_counter() - wall, time.process_time() - own
    print(f"{own / wall:.2f} cores for {wall:.1f} s", file=sys.stderr, flush=True)


def engine_of(student: str, precision: str) -> Engine:
    """The hybrid in a precision as `--hybrids` names it."""
    dtype, _, pages = precision.partition("+")
    return load_engine(student, dtype=dtype, options=EngineOptions(kv_dtype=pages or "auto"))


def main(
    student: Annotated[str, typer.Argument(help="The hybrid: a folder, or a pulled model.")],
    teacher: Annotated[str, typer.Option(help="The model it was made from: a folder, or a pulled one.")],
    text: Annotated[Path | None, typer.Option(help="A long text.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "2K,4K,8K",
    layers: Annotated[int, typer.Option(min=2, help="Layers of the teacher that are run.")] = 1000,
    dtypes: Annotated[str, typer.Option(help="Of the teacher; empty for the hybrid alone.")] = "float32",
    hybrids: Annotated[
        str, typer.Option(help="Of the hybrid, with +int8 for its pages; empty for none.")
    ] = "float32",
    clock: Annotated[str, typer.Option(help="wall, or processor.")] = "wall",
    rows: Annotated[Path, typer.Option(help="Rows are added here.")] = ROWS,
) -> None:
    if clock not in CLOCKS:
        raise typer.BadParameter(f"--clock must be one of {', '.join(CLOCKS)}, got {clock!r}")
    torch.set_flush_denormal(True)
    now = CLOCKS[clock]
    teacher = str(checkpoint_folder(teacher))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    counts = [token_count(n, "--lengths") for n in lengths.split(",")]
    long = text.read_text(encoding="utf-8") if text else long_document(8 * max(counts))
    all_ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    models = {
        name: AutoModelForCausalLM.from_pretrained(teacher, dtype=getattr(torch, name)).eval()
        for name in filter(None, dtypes.split(","))
    }
    engines = {name: engine_of(student, name) for name in filter(None, hybrids.split(","))}
    for engine in engines.values():
        time_hybrid(engine, all_ids[:600], now)  # compiled, warm
    for model in models.values():
        time_layers(model, torch.tensor([all_ids[:300]]), 1000, clock=now)
    every = []
    for tokens in counts:
        ids = all_ids[-tokens:]
        found = []
        for name, engine in engines.items():
            with cores():
                found.append(row("hybrid", tokens, 0, time_hybrid(engine, ids, now), name, clock))
        for name, model in models.items():
            number = min(layers, len(model.model.layers))
            with cores():
                timing = time_layers(model, torch.tensor([ids]), number, NEW_TOKENS - 1, clock=now)
            found.append(row("teacher", tokens, number, timing, name, clock))
        append_rows(rows, list(Row.__dataclass_fields__), [asdict(one) for one in found])
        for one in found:
            print(one, flush=True)
        every += found
    print_rows([asdict(one) for one in every])


if __name__ == "__main__":
    typer.run(main)
