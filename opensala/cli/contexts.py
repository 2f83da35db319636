"""`opensala ingest`, `opensala chat` and `opensala contexts`: parsing and printing only."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .notes import show_skipped
from .options import (
    Context,
    ContextOutput,
    Contexts,
    Documents,
    EngineOptions,
    HostMemory,
    Json,
    Model,
    Quiet,
    SamplingOptions,
    host_bytes,
    with_options,
)
from .sizes import byte_count, token_count

if TYPE_CHECKING:
    from ..engine import Document, Engine

app = typer.Typer(
    rich_markup_mode=None,
    help="Look after contexts: documents that were read once and kept (opensala ingest).",
)


def _read(documents: list[str], quiet: bool) -> "list[Document]":
    from ..engine import read_documents

    reading = read_documents(documents)
    if not quiet:
        show_skipped(reading)
    return reading.documents


def _with_room(loaded: "Engine", documents: "list[Document]", before: int, budget: int | None) -> "Engine":
    """An engine with places for documents behind `before` tokens."""
    from ..contexts.room import with_room
    from ..contexts.wording import Wording
    from ..engine.documents import join_documents

    if budget is None:
        return loaded
    tokens, _ = Wording(loaded.tokenizer).document(join_documents(documents))
    return with_room(loaded, before + len(tokens), budget)


@with_options
def ingest(
    documents: Documents,
    output: ContextOutput,
    engine: EngineOptions,
    model: Model = None,
    host_memory: HostMemory = None,
    quiet: Quiet = False,
) -> None:
    """Read documents once and keep them as a context, to be asked at any time."""
    from ..contexts import Context, read_manifest
    from ..contexts.manifest import MANIFEST

    budget = host_bytes(host_memory)
    if not output.strip():
        raise ValueError("--output is empty: name a folder for the context")
    begun = read_manifest(output) if (Path(output) / MANIFEST).exists() else None
    found = _read(documents, quiet)
    loaded = _with_room(engine.load(model, quiet, context=begun), found, 0, budget)
    with Context.ingest(loaded, found, output, quiet=quiet, host_memory=budget) as context:
        print(f"{output}: {context.describe()}")


@with_options
def chat(
    engine: EngineOptions,
    sampling: SamplingOptions,
    context: Annotated[
        str | None, typer.Argument(metavar="[CTX]", help="Context to talk about. Default: none.")
    ] = None,
    model: Model = None,
    host_memory: HostMemory = None,
    quiet: Quiet = False,
) -> None:
    """Talk about a context, or about nothing; /help lists what can be done with the conversation."""
    from ..contexts import Context, read_manifest
    from ..contexts.room import with_room
    from .chat import Chat

    chosen = sampling.checked()
    budget = host_bytes(host_memory)
    kept = None if context is None else read_manifest(context)  # before seconds of loading
    loaded = with_room(engine.load(model, quiet, context=kept), kept.tokens if kept else 0, budget)
    opened = Context.empty(loaded) if context is None else Context.open(loaded, context, host_memory=budget)
    with opened:
        Chat(opened, chosen, quiet).run()


@app.callback(invoke_without_command=True)
def _help_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


@app.command("list")
def list_(
    folder: Annotated[str, typer.Argument(help="Where to look.")] = ".",
    as_json: Json = False,
) -> None:
    """The contexts in a folder."""
    from ..contexts.store import describe, list_contexts

    found = list(list_contexts(folder))
    if as_json:
        problems = [{"path": str(c.path), "problem": c.problem} for c in found if c.problem]
        print(json.dumps([describe(c.path) for c in found if not c.problem] + problems))
        return
    for context in found:
        print(f"{context.path}: {context.problem}" if context.problem else _line(describe(context.path)))


def _line(record: dict[str, Any]) -> str:
    whole = "" if record["whole"] else f" of {record['planned_tokens']:,} (reading was interrupted)"
    turns = f", {len(record['turns'])} questions" if record["turns"] else ""
    documents = ", ".join(record["documents"][:3]) + (" ..." if len(record["documents"]) > 3 else "")
    size = record["bytes"] / 2**20
    return f"{record['path']}: {record['tokens']:,} tokens{whole}, {size:,.1f} MiB{turns}: {documents}"


@app.command()
def info(context: Context, as_json: Json = False) -> None:
    """What a context holds, and by what model it was read."""
    from ..contexts.store import describe

    record = describe(context)
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    print(_line(record))
    print(
        f"read in {record['attention']} attention and {record['dtype']}, keys and values in "
        f"{record['kv_dtype']}, by a model of {record['layers']} layers, {record['hidden_size']} wide; "
        f"{record['segments']} segments"
    )
    for turn in record["turns"]:
        print(f"Q: {turn['question']}\nA: {turn['answer']}")


@contextmanager
def _bytes_bar(label: str, total: int | None, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over bytes, which appears with the first of them."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(file=sys.stderr), disable=quiet)
    task = bar.add_task(label, total=total)

    def advance(size: int) -> None:
        bar.start()
        bar.advance(task, size)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _size(context: str) -> int:
    from ..contexts import read_manifest

    return read_manifest(context).num_bytes


@app.command()
def verify(context: Context, quiet: Quiet = False) -> None:
    """Read a whole context and check every byte of it."""
    from ..contexts import store

    with _bytes_bar("checking", _size(context), quiet) as advance:
        size = store.verify(context, advance)
    print(f"{context}: {size:,} bytes, as they were written")


@app.command()
def fork(context: Context, target: Annotated[str, typer.Argument(help="Folder of the new one.")]) -> None:
    """A second context that begins as the first; it takes no room until it goes on otherwise."""
    from ..contexts import store

    store.fork(context, target)
    print(target)


@app.command()
def compact(context: Context) -> None:
    """Merge the small segments that a context consists of after many extensions or turns."""
    from ..contexts import store

    before, after = store.compact(context)
    print(f"{context}: {after} segments of {before}")


@app.command()
@with_options
def extend(
    context: Context,
    documents: Documents,
    engine: EngineOptions,
    model: Model = None,
    host_memory: HostMemory = None,
    quiet: Quiet = False,
) -> None:
    """Add documents to a context; only they are read."""
    from ..contexts import Context as Kept
    from ..contexts import read_manifest

    budget, there = host_bytes(host_memory), read_manifest(context)
    found = _read(documents, quiet)
    loaded = _with_room(engine.load(model, quiet, context=there), found, there.tokens, budget)
    with Kept.open(loaded, context, write=True, host_memory=budget) as kept:
        kept.extend(found, quiet=quiet)
        print(f"{context}: {kept.describe()}")


@app.command()
def export(
    context: Context,
    file: Annotated[str, typer.Argument(help="File to write.")],
    quiet: Quiet = False,
) -> None:
    """Pack a context into one file, checked on the way."""
    from ..contexts import store

    with _bytes_bar("checking", _size(context), quiet) as advance:
        size = store.export(context, file, advance)
    print(f"{file}: {size:,} bytes")


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="File that was exported.")],
    context: Annotated[str, typer.Argument(metavar="CTX", help="Folder of the new context.")],
    quiet: Quiet = False,
) -> None:
    """Unpack an exported context, checked before it counts."""
    from ..contexts import store

    with _bytes_bar("checking", None, quiet) as advance:
        store.unpack(file, context, advance)
    print(context)


@app.command()
def rm(contexts: Contexts) -> None:
    """Remove contexts."""
    from ..contexts import store

    for context in contexts:
        print(f"{context}: {store.remove(context):,} bytes removed")


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of a checkpoint. Default: the small model that ships here."),
    ] = None,
    context: Annotated[str, typer.Option("--context", help="Tokens, as 64K or 1M.")] = "1M",
    device_memory: Annotated[
        str | None, typer.Option(help="Of your card, as 32GB. Default: cards of 24 to 141 GB.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    kv_dtype: Annotated[
        str, typer.Option(help="Of keys and values: auto (as --dtype), float32, bfloat16 or int8.")
    ] = "auto",
) -> None:
    """What a context takes, part by part, and where it fits, before anything runs."""
    from ..engine.load import DTYPES, checkpoint_config
    from ..engine.options import kept_dtype
    from ..engine.plan import CARDS, plan_context

    tokens = token_count(context, "--context")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be {', '.join(DTYPES)}, got {dtype!r}")
    kept = kept_dtype(kv_dtype, DTYPES[dtype], "--kv-dtype")
    cards = (
        [byte_count(device_memory, "--device-memory")]
        if device_memory is not None
        else [n * 10**9 for n in CARDS]
    )
    found = plan_context(checkpoint_config(model), tokens, DTYPES[dtype], kept)
    print(f"{tokens:,} tokens in {dtype}{'' if kv_dtype == 'auto' else ', keys and values in ' + kv_dtype}:")
    for name, size in (
        ("weights", found.weights),
        ("keys and values", found.keys_values),
        ("compressed keys", found.compressed),
        ("states (3 slots)", found.states),
        ("activations of a chunk (estimate)", found.activations),
        ("all", found.total),
        ("without keys and values that no token attends to", found.resident),
    ):
        print(f"  {name:<50} {size / 1e9:>10,.3f} GB")
    said = {"all": "fits", "resident": "fits if keys and values lie in slower memory", "no": "does not fit"}
    for card in cards:
        print(f"  {card / 1e9:,g} GB: {said[found.fits(card)]}")


def add_commands(to: typer.Typer) -> None:
    """Put `ingest`, `chat` and `plan` among the commands."""
    to.command()(plan)
    to.command()(ingest)
    to.command()(chat)
