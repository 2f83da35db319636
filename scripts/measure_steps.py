"""Time decoding steps behind contexts of many lengths, for weights in several forms: a step in one native
call, and the same one as recorded calls and layer by layer in Python.

    python scripts/measure_steps.py --contexts 100,3000 --sequences 1,8
    python scripts/measure_steps.py --preset 135m --weights float32,bfloat16,int4 --contexts 4K,32K,256K \
        --kv-dtype auto,bfloat16

Without --preset it is the shipped model, with --model another checkpoint, each as it is loaded. Keys, values,
compressed keys and states of a context are random numbers: nothing is read, and no time depends on them. All
forms of a step take turns in one process; medians, and 20th and 80th percentiles. The last line on stdout is
JSON.
"""

import itertools
import time
from array import array
from typing import Annotated, Any

import torch
import typer

from opensala.bench.record import print_rows, significant
from opensala.bench.speed.contenders import Hybrid, quantise_at_random
from opensala.bench.speed.presets import preset as preset_of
from opensala.bench.timing import quantiles
from opensala.cli.sizes import token_count
from opensala.engine import Engine, EngineOptions, SamplingParams, load_engine
from opensala.engine.precision import Precision, apply_precision
from opensala.model import MiniCPMSALAForCausalLM

WARM_UP = 3  # steps of a context that do not count: the first ones make what later ones reuse
# `noting` is `one call` with the selected blocks noted for a client that asks where the model looked.
FORMS = ("one call", "recorded", "layer by layer", "noting")


def model_of(preset: str, model: str, weights: str) -> MiniCPMSALAForCausalLM:
    """The shipped model (`float32`), a checkpoint, or random weights of a preset's shape."""
    if preset:
        return Hybrid(preset_of(preset), weights, torch.device("cpu")).model
    loaded = load_engine(model or None, dtype="float32", options=EngineOptions(max_cached_tokens=1000)).model
    bits = {"int8": 8, "int4": 4}.get(weights)
    if bits:
        quantise_at_random(loaded, bits)
    if weights != "float32":
        apply_precision(loaded, Precision(torch.bfloat16))
    return loaded


def engine_behind(
    model: MiniCPMSALAForCausalLM, kv_dtype: str, context: int, sequences: int, steps: int, noting: bool
) -> Engine:
    """An engine whose sequences each have a random context of so many tokens behind them, and decode."""
    options = EngineOptions(
        max_cached_tokens=(sequences + 1) * (context + steps + 128),
        max_running=sequences,
        max_snapshots=sequences + 2,
        kv_dtype=kv_dtype,
    )
    engine = Engine(model, None, options)
    draw = torch.Generator().manual_seed(0)
    texts = [
        array("i", torch.randint(3, model.config.vocab_size, (context,), generator=draw).tolist())
        for _ in range(sequences)
    ]
    holds = [engine.scheduler.holds.place(text, model.config.attends_sparsely(context + 1)) for text in texts]
    for hold in holds:
        low, high = min(hold.pages), max(hold.pages) + 1
        for tensor in (tensor for pool in engine.storage.kv.values() for tensor in pool):
            tensor[low:high].normal_(generator=draw)
        for states in engine.storage.states.values():
            states[hold.slot].normal_(generator=draw)
        engine.scheduler.holds.settle(hold)
    for text in texts:
        engine.add([*text, 3], SamplingParams(max_tokens=steps, ignore_eos=True, selection=steps * noting))
    return engine


def timed_steps(engine: Engine, count: int) -> list[float]:
    """Seconds of so many steps."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    model: MiniCPMSALAForCausalLM, kv_dtype: str, context: int, sequences: int, forms: list[str], rounds: int
) -> Any:
    """Timings of the forms, in turns of eight steps."""
    engines = {}
    for form in forms:
        engines[form] = engine = engine_behind(
            model, kv_dtype, context, sequences, 8 * rounds + WARM_UP, form == "noting"
        )
        if form in ("recorded", "layer by layer"):
            engine.runner.native.reason = "timed beside the step in one call"
        if form == "layer by layer":
            engine.runner.graphs.reason = "timed beside the step in one call"
        timed_steps(engine, WARM_UP)
        if form in ("one call", "noting") and not engine.runner.native.num_steps:
            raise ValueError(f"a step of this model does not run in one call: {engine.runner.native.reason}")
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        for form, engine in engines.items():
            seconds[form] += timed_steps(engine, 8)
    return {form: quantiles(found) for form, found in seconds.items()}


def main(
    preset: Annotated[str, typer.Option(help="Random weights of a shape of `bench speed`.")] = "",
    model: Annotated[str, typer.Option(help="A checkpoint; default: the shipped model.")] = "",
    weights: Annotated[str, typer.Option(help="float32, bfloat16, int8, int4.")] = "float32",
    kv_dtype: Annotated[
        str, typer.Option(help="Of keys and values: auto, float32, bfloat16, int8.")
    ] = "auto",
    contexts: Annotated[str, typer.Option(help="Tokens behind which a step is timed.")] = "4K,32K,256K",
    sequences: Annotated[str, typer.Option(help="How many decode together.")] = "1",
    forms: Annotated[str, typer.Option(help=f"Some of: {', '.join(FORMS)}.")] = "one call",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of eight steps.")] = 6,
) -> None:
    chosen, rows = forms.split(","), []
    if unknown := [form for form in chosen if form not in FORMS]:
        raise typer.BadParameter(f"--forms must name some of {', '.join(FORMS)}, got {unknown[0]!r}")
    for form in weights.split(","):
        made = model_of(preset, model, form)
        lengths = [token_count(n, "--contexts") for n in contexts.split(",")]
        every = itertools.product(kv_dtype.split(","), lengths, map(int, sequences.split(",")))
        for kept, context, count in every:
            for how, timing in measure(made, kept, context, count, chosen, rounds).items():
                at = {"weights": form, "kv_dtype": kept, "context": context, "sequences": count, "form": how}
                found = {"p20": timing.p20, "p50": timing.p50, "p80": timing.p80}
                rows.append(at | {f"{name}_ms": significant(1e3 * x) for name, x in found.items()})
                print(rows[-1], flush=True)
    print_rows(rows)


if __name__ == "__main__":
    typer.run(main)
