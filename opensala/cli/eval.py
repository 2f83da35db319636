"""The `opensala eval` commands: parsing only. `opensala eval [MODEL] ...` is `opensala eval run [MODEL]
...`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .options import EngineOptions, Json, Quiet, with_options
from .sizes import token_count


class _RunByDefault(TyperGroup):
    """A group whose first word may be left out: then it is `run`. A folder called `score` is given as
    `./score`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


evals = typer.Typer(
    cls=_RunByDefault,
    rich_markup_mode=None,
    help="Evaluate a model: `opensala eval [MODEL] --suite NAME` (see `opensala eval run --help`), score "
    "files, make reports.",
)

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder of the results; a run stopped half-way goes on from there."),
]


@evals.command()
@with_options
def run(
    engine: EngineOptions,
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of a checkpoint. Default: the small model that ships here."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="ruler, mrcr, nolima, livecodebench, long, ultra, standard, tasks of RULER or of "
            "lm-eval; several separated by commas."
        ),
    ] = "ruler",
    lengths: Annotated[
        str, typer.Option(help="Tokens, separated by commas. Default: those of the suite.")
    ] = "",
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples of each task and length. Default: 10; all of LiveCodeBench and lm-eval's tasks.",
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=1, help="Questions asked about each generated document, read once for all.")
    ] = 1,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a suite's files are: SUITE=PATH, SUITE=hub or SUITE=hub:OWNER/NAME, for mrcr, "
            "nolima, livecodebench; ruler=FOLDER."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval tasks (YAML) of your own.")
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run programs that the model writes, in a process without rights."
        ),
    ] = False,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Short prompts of lm-eval's tasks that run together; a killed run loses so many."
        ),
    ] = 1,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens an answer may take in LiveCodeBench. Default: 4096.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated documents.")] = 0,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep generated documents on disk for the next run.")
    ] = True,
    chat: Annotated[
        bool | None, typer.Option(help="Use the chat template. Default: if the model has one.")
    ] = None,
    strip_thinking: Annotated[
        bool, typer.Option("--strip-thinking", help="Score only what comes after </think>.")
    ] = False,
    output: Output = Path("evaluation"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a suite, or go on with it."""
    from ..evaluate.document_cache import default_folder
    from ..evaluate.suites import PRESETS, Options, build_suites, split_names

    ours, foreign = split_names(suite)
    sizes = tuple(token_count(part, "--lengths") for part in lengths.split(",")) if lengths else ()
    options = Options(
        sizes,
        samples,
        questions,
        seed,
        default_folder() if cache else None,
        _paths(data or []),
        answer_tokens,
        allow_code,
    )
    suites = build_suites(ours, options)
    harness = _load(foreign, include_path, allow_code, strip_thinking, quiet) if foreign else None
    from ..evaluate.work import evaluate

    if allow_code and not quiet:
        _say_what_is_possible()
    loaded = engine.load(model, quiet)
    figures: dict[str, Any] = {}
    if harness is not None:
        from ..evaluate.harness import run_tasks

        figures = run_tasks(
            loaded,
            harness,
            output,
            limit=samples,
            chat=chat,
            batch_size=batch_size,
            allow_code=allow_code,
            quiet=quiet,
        )
    summary: dict[str, Any] = {"suites": {}, "prompt_tokens": 0, "read_tokens": 0}
    if suites:
        summary = evaluate(loaded, suites, output, chat=chat, strip_thoughts=strip_thinking, quiet=quiet)
    if as_json:
        print(
            json.dumps(
                summary | ({"lm_eval": figures["results"]} if figures else {}),
                ensure_ascii=False,
                default=str,
            )
        )
        return
    _print_tables(summary, figures, Path(loaded.name).name if set(ours) & set(PRESETS) else "")
    if suites and not quiet:
        print(
            f"{summary['read_tokens']:,} of {summary['prompt_tokens']:,} prompt tokens were read, the "
            "rest was shared; every sample is in "
            f"{output / 'samples.jsonl'}",
            file=sys.stderr,
        )


def _print_tables(summary: dict[str, Any], figures: dict[str, Any], name: str) -> None:
    """Scores; with a model's `name` the paper's tables too."""
    from ..evaluate.report import paper_tables
    from ..evaluate.tables import figures_table, score_table

    tables = (
        figures_table(figures),
        score_table(summary),
        paper_tables(name, summary, figures) if name else "",
    )
    print("\n\n".join(table for table in tables if table))


@evals.command()
def score(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Files of predictions, named after their task: qa_1.jsonl."),
    ],
    form: Annotated[str, typer.Option("--format", help="ruler: lines with pred and outputs.")] = "ruler",
    as_json: Json = False,
) -> None:
    """Score predictions that RULER's own scripts (or anyone) wrote."""
    from ..evaluate.ruler_files import score_file

    if form != "ruler":
        raise ValueError(f"--format must be ruler, got {form!r}")
    scores = [score_file(path) for path in files]
    if as_json:
        print(json.dumps({s.task: s.as_dict() for s in scores}))
        return
    for s in scores:
        print(f"{s.task}: {s.score:.2f} ({s.rule}, {s.samples} samples, {s.empty} empty answers)")


@evals.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of results.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.md, report.html and the pictures.")
    ] = Path("evaluation-report"),
) -> None:
    """Make a report with the published figures beside these, and plots, as Markdown and as one HTML file."""
    from ..evaluate.report import write_report

    print(write_report(folders, output))


def _load(
    names: list[str], include_path: Path | None, allow_code: bool, strip_thinking: bool, quiet: bool
) -> Any:
    """Tasks of lm-eval; what is refused whatever their data is refused before those are fetched."""
    from ..evaluate.harness import load_tasks
    from ..evaluate.standard import BENCHMARKS, NO_LEAVE
    from ..evaluate.suites import NAMES

    if strip_thinking:
        raise ValueError(
            f"--strip-thinking: lm-eval's tasks ({', '.join(names)}) score answers as they are; leave it away"
        )
    running = [b.task for b in BENCHMARKS if b.runs_code and b.task in names]
    if running and not allow_code:
        raise ValueError(f"{', '.join(running)}: {NO_LEAVE}")
    return load_tasks(names, include_path, allow_code, NAMES, quiet)


def _say_what_is_possible() -> None:
    from ..evaluate.sandbox import unprotected

    for lack in unprotected():
        print(
            f"note: on this machine programs that the model writes are not kept from {lack}", file=sys.stderr
        )


def _paths(data: list[str]) -> dict[str, Path]:
    from ..evaluate.hub import data_path

    found = {}
    for entry in data:
        name, equals, path = entry.partition("=")
        if not equals or not path:
            raise ValueError(f"--data: must be SUITE=PATH, SUITE=hub or SUITE=hub:OWNER/NAME, got {entry!r}")
        found[name] = data_path(name, path)
    return found
