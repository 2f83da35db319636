"""`opensala serve`: the arguments of the server, and of `opensala serve keys`. Parsing only."""

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from .group import RunUnlessNamed
from .options import EngineOptions, HostMemory, Json, PrefixOptions, Quiet, host_bytes, with_options

app = typer.Typer(
    cls=RunUnlessNamed,
    add_completion=False,
    rich_markup_mode=None,
    help="Serve a model over the APIs of OpenAI and Anthropic (serve [MODEL]), or manage keys (serve keys).",
)
keys = typer.Typer(rich_markup_mode=None, help="API keys: new, list, revoke.")
app.add_typer(keys, name="keys")

KeyPath = Annotated[Path, typer.Option("--file", help="The key file.")]
Name = Annotated[str, typer.Argument(help="Whose key it is.")]
_KEYS = Path("keys.json")
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@app.command(hidden=True)
@with_options
def run(
    engine: EngineOptions,
    prefixes: PrefixOptions,
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of a checkpoint. Default: the small model that ships here."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to; others than this machine need --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the last part of its name.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--keys", help="Key file; without one, whoever can connect may ask.")
    ] = None,
    contexts: Annotated[
        Path | None, typer.Option(help="Folder in which contexts of clients are kept. Default: none are.")
    ] = None,
    context_ttl: Annotated[
        int, typer.Option(help="Seconds that a context is kept which does not say; 0 for no end.")
    ] = 7 * 86_400,
    max_contexts_per_key: Annotated[int, typer.Option(help="Contexts that one key may keep.")] = 64,
    max_context_gib_per_key: Annotated[float, typer.Option(help="GiB of disk for them.")] = 16.0,
    max_running: Annotated[int, typer.Option(help="Sequences computed together; more wait.")] = 16,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens computed in one step at most.")] = 4096,
    max_cached_tokens: Annotated[
        int | None, typer.Option(help="Tokens that memory is set aside for. Default: most of what is free.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Of one prompt. Default: what the model and the memory hold.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that a request may ask for.")] = 32_768,
    default_new_tokens: Annotated[int, typer.Option(help="For a chat that does not say.")] = 1024,
    max_body_mib: Annotated[int, typer.Option(help="MiB of one request's body.")] = 32,
    max_requests: Annotated[int, typer.Option(help="Requests in flight, of all keys.")] = 512,
    max_requests_per_key: Annotated[int, typer.Option(help="Requests in flight, of one key.")] = 128,
    requests_per_minute: Annotated[int, typer.Option(help="For one key; 0 for no limit.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 3600.0,
    grace: Annotated[
        float, typer.Option(help="Seconds for requests under way when the server stops.")
    ] = 10.0,
    stall: Annotated[
        float, typer.Option(help="Times that a long prompt may slow down running streams; 0 for no limit.")
    ] = 2.5,
    speculate: Annotated[int, typer.Option(help="Tokens to draft at most by prompt lookup; 0 for none.")] = 8,
    host_memory: HostMemory = None,
    forget_after: Annotated[
        float,
        typer.Option(
            help="Seconds without a request, after which what was read is forgotten and its memory free for "
            "others; 0 for never."
        ),
    ] = 3600.0,
    stable_prefix: Annotated[
        bool,
        typer.Option(
            help="Move date lines of system prompts to the end, leave billing lines out (docs/server.md)."
        ),
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Serve a model until Ctrl-C."""
    _check_extra()
    from ..engine import EngineOptions as Bounds
    from ..server import KeyFile, ServerOptions, Service, build_server, check_bind, settle

    if name is not None and not name.strip():
        raise ValueError("--name is empty: say what clients call the model, or omit it")
    known = None if key_file is None else KeyFile(key_file)
    check_bind(host, port, known)
    options = ServerOptions(
        max_body_bytes=max_body_mib << 20,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        default_new_tokens=default_new_tokens,
        max_requests=max_requests,
        max_requests_per_key=max_requests_per_key,
        requests_per_minute=requests_per_minute,
        request_seconds=timeout,
        grace_seconds=grace,
        stall=stall,
        max_contexts_per_key=max_contexts_per_key,
        max_context_bytes_per_key=int(max_context_gib_per_key * 2**30),
        context_seconds=context_ttl,
        forget_seconds=forget_after,
        stable_prefix=stable_prefix,
    )
    bounds = Bounds(
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        max_cached_tokens=max_cached_tokens,
        speculate=speculate,
        host_memory=host_bytes(host_memory),
    )
    prefixes.check()  # before seconds of loading
    loaded = engine.load(model, quiet, bounds)
    served = name or ("opensala-small" if model is None else Path(model).name)
    if not quiet:
        logging.getLogger("opensala.server").setLevel(logging.INFO)
    service = Service(loaded, served, options, known, contexts, prefixes.open(loaded))
    server = build_server(service, host, port)
    server.announce = None if quiet else _announce
    settle()
    server.run()


def _announce(url: str, name: str, context: int) -> None:
    print(
        f"serving {name} at {url} ({context:,} tokens of context); Ctrl-C stops it",
        file=sys.stderr,
        flush=True,
    )


@keys.command()
def new(name: Name, path: KeyPath = _KEYS) -> None:
    """Make a key and print it: it is kept as a hash, so this is the only time that it can be seen."""
    _check_extra()
    from ..server import new_key

    print(new_key(path, name)[1])


@keys.command()
def revoke(name: Name, path: KeyPath = _KEYS) -> None:
    """Take a key back; a running server knows at once."""
    _check_extra()
    from ..server import revoke_key

    revoke_key(path, name)


@keys.command("list")
def show(path: KeyPath = _KEYS, as_json: Json = False) -> None:
    """Names of the keys in a file."""
    _check_extra()
    from ..server import list_keys

    found = list_keys(path)
    if as_json:
        print(json.dumps([{"id": key.id, "name": key.name, "created": key.created} for key in found]))
    else:
        print("\n".join(key.name for key in found))


@app.callback()
def _group() -> None:
    """Serve a model, or manage API keys."""


def _check_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"opensala serve needs {', '.join(missing)}: install the extra with pip install 'opensala[serve]'"
        )
