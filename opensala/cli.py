"""The `opensala` command: a table of commands that parse their arguments and hand the work on.

Answers go to stdout, everything else to stderr. Bad input ends with one line and exit code 2.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .cli_convert import app as convert_app
from .cli_eval import evals
from .cli_train import app as train_app

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Read very long documents with hybrid sparse/linear models.",
)

benches = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure speed and memory on this machine."
)
app.add_typer(benches, name="bench")
app.add_typer(evals, name="eval")

Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name of a MiniCPM-SALA checkpoint. Default: the small model that ships here."
    ),
]
MaxNew = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Mode = Annotated[
    str | None,
    typer.Option(help="auto (dense below the model's dense_len, sparse from there), dense or sparse."),
]
Search = Annotated[
    str | None,
    typer.Option(
        help="How sparse layers look for blocks: exact, or hierarchical for contexts near a million tokens."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print answer and measurements as one JSON object.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the most likely tokens that together have this probability.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling.")]
Quiet = Annotated[bool, typer.Option(help="No progress bar and no notes.")]


def _engine(
    model: str | None,
    device: str,
    dtype: str,
    attention_mode: str | None,
    block_search: str | None,
    quiet: bool,
) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from .engine import Engine

    if quiet:
        disable_progress_bar()
    return Engine(model, device=device, dtype=dtype, attention_mode=attention_mode, block_search=block_search)


def _report(result: Any, key: str, as_json: bool, quiet: bool, shown: bool = False) -> None:
    """Print a generation: its text to stdout, what it cost to stderr (or all of it as JSON to stdout)."""
    if as_json:
        record = result.as_dict()
        print(json.dumps({key: record.pop("text"), **record}, ensure_ascii=False))
        return
    if not shown:
        print(result.text)
    if not quiet:
        decode = (
            ""
            if result.decode_tokens_per_second is None
            else f", then {result.decode_tokens_per_second:,.1f} tokens/s"
        )
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        print(result.attention, file=sys.stderr)
        print(
            f"{result.prompt_tokens:,} tokens read, first token after {result.time_to_first_token:.2f} s "
            f"({result.prefill_tokens_per_second:,.0f} tokens/s){decode}; cache "
            f"{result.cache_bytes / 2**20:,.1f} MiB, "
            f"peak memory {result.peak_memory_bytes / 2**20:,.0f} MiB",
            file=sys.stderr,
        )


@app.command()
def ask(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOC...", help="Files (text, source code, Markdown, PDF), directories, or - for stdin."
        ),
    ],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask.")],
    model: Model = None,
    max_new_tokens: MaxNew = 64,
    attention_mode: Mode = None,
    block_search: Search = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a question about documents of any length."""
    from .engine import Sampling, read_documents
    from .engine import ask as run

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    texts = read_documents(documents)
    result = run(
        _engine(model, device, dtype, attention_mode, block_search, quiet),
        texts,
        question,
        sampling,
        quiet=quiet,
    )
    _report(result, "answer", as_json, quiet)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue, or - for stdin.")],
    model: Model = None,
    max_new_tokens: MaxNew = 64,
    attention_mode: Mode = None,
    block_search: Search = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text, printing it as it comes."""
    from .engine import Sampling, read_documents

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    text = read_documents(["-"])[0].text if prompt == "-" else prompt
    if not text:
        raise ValueError("the prompt is empty")
    engine = _engine(model, device, dtype, attention_mode, block_search, quiet)
    result = engine.generate(engine.encode_prompt(text), sampling, stream=not as_json, quiet=quiet)
    _report(result, "text", as_json, quiet, shown=True)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=2048, help="Length of the document.")] = 32768,
    seed: Seed = None,
) -> None:
    """Hide a fact in the standard library's sources, ask for it, and time a full-attention twin beside."""
    from .bench.demo import run

    run(tokens, seed)


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
) -> None:
    """Time the attention ops against their baselines, after checking their results; the last line on stdout
    is JSON."""
    from .bench.ops import run

    run(quick, device, rows, million)


app.add_typer(convert_app, name="convert")
app.add_typer(train_app, name="train")


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; bad input becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    for name in ("transformers", "huggingface_hub", "opensala"):  # what they would say is part of the report
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C inside a command into this code, without a word
            _fail("interrupted", code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", INTERRUPTED)
    except ValueError as error:
        code = _fail(str(error), 2)
    except typer.TyperException as error:  # usage errors: unknown options, missing arguments
        code = _fail(error.format_message(), 2)
    except MemoryError:
        code = _fail("out of memory: shorten the document or use a smaller --dtype", 2)
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    print(f"opensala: {' '.join(message.split())}", file=sys.stderr)
    return code
