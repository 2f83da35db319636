"""The table of commands: each parses its arguments and hands the work on.

Answers go to stdout, everything else to stderr.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from .check import check
from .contexts import add_commands
from .contexts import app as contexts_app
from .convert import app as convert_app
from .eval import evals
from .models import models, pull
from .notes import show_cost, show_skipped
from .options import (
    Device,
    EngineOptions,
    HostMemory,
    Json,
    Model,
    PrefixOptions,
    Quiet,
    SamplingOptions,
    Seed,
    host_bytes,
    with_options,
)
from .quantize import quantize
from .serve import app as serve_app
from .sizes import token_count
from .train import app as train_app

if TYPE_CHECKING:
    from ..engine import Generation, Reading, SamplingParams

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Read very long documents with hybrid sparse/linear models.",
)

benches = typer.Typer(rich_markup_mode=None, help="Measure speed and memory on this machine.")
app.add_typer(benches, name="bench")
app.add_typer(evals, name="eval")
app.add_typer(convert_app, name="convert")
app.add_typer(train_app, name="train")
app.add_typer(contexts_app, name="contexts")
app.command()(pull)
app.command()(models)
app.command()(quantize)
app.command()(check)
app.add_typer(serve_app, name="serve")


@app.command()
@with_options
def ask(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOC...",
            help="Files (text, source code, Markdown, PDF), directories, pipes, - for stdin; or one context.",
        ),
    ],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    prefixes: PrefixOptions,
    model: Model = None,
    host_memory: HostMemory = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a question about documents of any length."""
    from ..contexts.store import is_context
    from ..engine import Reading, check_text, read_documents
    from ..engine import ask as run

    chosen = sampling.checked()
    check_text("the question", question.strip())
    kept = [d for d in documents if is_context(d)]
    if kept and len(documents) > 1:
        raise ValueError(f"{kept[0]} is a context, which is asked alone: name it without other documents")
    if host_memory is not None and not kept:
        raise ValueError("--host-memory is for a context (opensala ingest makes one), not for documents")
    if prefixes.prefix_dir is not None and kept:
        raise ValueError("--prefix-dir is for documents, not for a context, which is kept as it is")
    prefixes.check()
    if kept:
        result = _ask_context(engine, model, kept[0], question, chosen, host_memory, quiet)
        _show(Reading(), result, as_json, quiet)
        return
    reading = read_documents(documents)
    if not quiet and not as_json:
        show_skipped(reading)
    loaded = engine.load(model, quiet)
    with prefixes.open(loaded) or nullcontext():  # what was read is kept behind the answer
        result = run(loaded, reading.documents, question, chosen, quiet=quiet)
        _show(reading, result, as_json, quiet)


def _show(reading: "Reading", result: "Generation", as_json: bool, quiet: bool) -> None:
    if as_json:
        record = result.as_dict()
        record["notes"] = reading.notes + record["notes"]
        record["skipped"] = [{"name": s.name, "reason": s.reason} for s in reading.skipped]
        print(json.dumps({"answer": record.pop("text"), **record}, ensure_ascii=False), flush=True)
        return
    print(result.text, flush=True)
    if not quiet:
        show_cost(result)


add_commands(app)


def _ask_context(
    engine: EngineOptions,
    model: str | None,
    path: str,
    question: str,
    params: "SamplingParams",
    host_memory: str | None,
    quiet: bool,
) -> "Generation":
    from ..contexts import Context, read_manifest
    from ..contexts.room import with_room

    budget = host_bytes(host_memory)
    kept = read_manifest(path)  # before seconds of loading
    loaded = with_room(engine.load(model, quiet, context=kept), kept.tokens, budget)
    with Context.open(loaded, path, host_memory=budget) as context:
        result = context.ask(question, params, quiet=quiet)
        result.notes += [] if budget is None else [context.traffic()]
        return result


@app.command()
@with_options
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue, or - for stdin.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    model: Model = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text, printing it as it comes."""
    from ..engine import check_text, read_documents
    from ..engine import generate as run

    chosen = sampling.checked()
    if prompt == "-":
        reading = read_documents(["-"])
        text, notes = reading.documents[0].text, reading.notes
    else:
        text, notes = prompt, []
    check_text("the prompt", text)
    loaded = engine.load(model, quiet)
    result = run(loaded, loaded.encode(text), chosen, stream=not as_json, quiet=quiet)
    result.notes = notes + result.notes
    if as_json:
        record = result.as_dict()
        print(json.dumps({"text": record.pop("text"), **record}, ensure_ascii=False))
    elif not quiet:
        show_cost(result)


@app.command()
def demo(
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2048,
            max=4 << 20,
            help="Length of the text; 16384 for a converted model, 32768 for the small.",
        ),
    ] = None,
    seed: Seed = None,
    model: Annotated[
        str | None,
        typer.Option(help="A pulled hybrid, or small. Default: small; with --pull both."),
    ] = None,
    pull: Annotated[
        bool,
        typer.Option("--pull", help="Get the hybrid and show it too, unless nothing that has it answers."),
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Run all layers of the original, not six that tell the rest.")
    ] = False,
) -> None:
    """Ask about a long text, and time full attention beside: the original of a pulled hybrid, or a twin."""
    from ..bench.demo import run

    run(tokens, seed, model, pull, full)


@benches.command()
def ops(
    quick: Annotated[
        bool, typer.Option("--quick", help="16K tokens and no whole models: a minute on two cores.")
    ] = False,
    million: Annotated[
        bool,
        typer.Option("--million", help="Also a million tokens through each op and the shipped model (CPU)."),
    ] = False,
    device: Device = "auto",
    rows: Annotated[Path, typer.Option(help="CSV file the rows are added to.")] = Path(
        "benchmarks/results.csv"
    ),
    unit: Annotated[
        int, typer.Option(help="Tokens of a K: fewer show that all of it runs.", hidden=True)
    ] = 1024,
) -> None:
    """Time the attention ops against their peers, after checking their results; the last line on stdout is
    JSON."""
    from ..bench.ops import run

    run(quick, device, rows, million, unit)


@benches.command()
def speed(
    preset: Annotated[
        str, typer.Option(help="135m, small (the shape that ships), 9b beside Qwen3-8B, or quick.")
    ] = "135m",
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of prompts, as 4K,32K. Default: some for the device.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Contenders, separated by commas, as sala-int4,llama.cpp-Q4_0. Default: all."),
    ] = None,
    generate: Annotated[int, typer.Option(help="Tokens generated behind each prompt.")] = 32,
    limit: Annotated[
        float,
        typer.Option(help="Seconds that reading a prompt may be expected to take; beyond, it is left out."),
    ] = 1800,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny shape and short prompts: seconds.")] = False,
    llama_cpp: Annotated[
        str | None, typer.Option(help="A Python that has llama_cpp. Default: what bench llama-cpp made.")
    ] = None,
    device: Device = "auto",
    rows: Annotated[Path, typer.Option(help="CSV file the rows are added to.")] = Path(
        "benchmarks/speed.csv"
    ),
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures.")] = None,
) -> None:
    """Time to first token, ms per token and memory by length, beside a dense model in transformers and
    llama.cpp; the last line on stdout is JSON."""
    from ..bench.speed.run import Options, run

    tokens = tuple(token_count(n, "--lengths") for n in (lengths or "").split(",") if n)
    names = tuple(n for n in (against or "").split(",") if n)
    if quick:
        preset, tokens = "quick", tokens or (128, 1024)
    run(Options(preset, tokens, names, generate, limit, device, llama_cpp), rows, plots)


@benches.command("llama-cpp")
def llama_cpp() -> None:
    """Build llama.cpp for this processor in an environment of its own; prints its Python."""
    from ..bench.speed.llama_setup import build

    print(build())


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    _help_alone(context)


@benches.callback(invoke_without_command=True)
def _help_alone(context: typer.Context) -> None:
    """A group without a command: its help, and the exit code of bad input."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)
