"""Tasks of lm-eval on this engine, from the command line: found, checked, run, resumed and written down.

Beside `run.json`, the folder of results gets `requests.jsonl` (each answer as it comes), and at the end
`lm_eval.json` (figures by task, with versions, settings and seeds) and `lm_eval_samples.jsonl` (each
document's id, hashes, answers and figures).
"""

import contextlib
import difflib
import importlib.metadata
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..runs import FolderLock, write_errors
from .provenance import circumstances, identity
from .results import Results
from .standard import NO_LEAVE

INSTALL = "pip install 'opensala[eval]'"
_SEED = 1234  # lm-eval's own default, for torch, numpy and the choice of examples; Python's is 0


@dataclass(frozen=True)
class Harness:
    """Loaded tasks of lm-eval: `tasks` are Task and Group objects, `names` what was asked for."""

    names: tuple[str, ...]
    tasks: list[Any]
    manager: Any


def load_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    allow_code: bool = False,
    known: Sequence[str] = (),
    quiet: bool = False,
) -> Harness:
    """Find tasks by name and load their data.

    Args:
        include_path: folder with tasks of one's own; they come before lm-eval's.
        allow_code: load tasks that run generated programs.
        known: other names, for "did you mean".
        quiet: no progress bars of the loading.

    Raises:
        ValueError: lm-eval is missing; unknown names; unavailable data or packages; programs would be
            run without permission.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"{', '.join(names)}: not a suite of this package ({', '.join(known)}), and lm-eval, which "
            "may have it, "
            f"is not installed: {INSTALL}"
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path: {include_path} is not a folder")
    if quiet:
        import datasets

        datasets.disable_progress_bars()
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # reads lm-eval's 14,000 task files: seconds
    _check_names(names, manager, known)
    loaded = _load_all(names, manager)
    running = sorted({t.config.task for t in _leaves(loaded) if getattr(t, "UNSAFE_CODE", False)})
    if running and not allow_code:
        raise ValueError(f"{', '.join(running)}: {NO_LEAVE}")
    return Harness(tuple(names), loaded, manager)


def _check_names(names: Sequence[str], manager: Any, known: Sequence[str]) -> None:
    for name in names:
        if name not in manager.all_tasks:
            near = " or ".join(difflib.get_close_matches(name, [*known, *manager.all_tasks], 3))
            raise ValueError(
                f"suite {name!r} does not exist, here or in "
                f"lm-eval{f': did you mean {near}?' if near else '.'} "
                f"There are {', '.join(known)} and lm-eval's {len(manager.all_tasks):,} tasks"
            )


def _load_all(names: Sequence[str], manager: Any) -> list[Any]:
    loaded = list[Any]()
    failed = dict[str, str]()
    for name in names:
        try:
            loaded += _load(manager, name)
        except ImportError as error:
            failed[name] = f"needs the package {error.name} (pip install {error.name})"
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # datasets' and the hub's own errors for unavailable data are among these
            failed[name] = " ".join(str(error).split())[:200]
    if failed:
        rest = [name for name in names if name not in failed]
        raise ValueError(
            f"{len(failed)} of {len(names)} tasks could not be loaded: "
            f"{'; '.join(f'{n}: {why}' for n, why in failed.items())}. Data are fetched "
            "from the hub once and then kept: connect to the "
            f"network{', or choose --suite ' + ','.join(rest) if rest else ''}"
        )
    return loaded


def _load(manager: Any, name: str) -> list[Any]:
    from .code_eval import sandboxed_code_eval

    with sandboxed_code_eval():  # HumanEval and MBPP fetch their scorer while they are read
        found = manager.load([name])
    inner = {child for children in (found.get("group_map") or {}).values() for child in children}
    groups = [g for n, g in (found.get("groups") or {}).items() if n not in inner]
    grouped = {t.task_name for g in groups for t in g.get_all_tasks()}
    return [*groups, *(t for n, t in found["tasks"].items() if n not in grouped)]


def _leaves(loaded: Sequence[Any]) -> list[Any]:
    return [
        task
        for item in loaded
        for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])
    ]


def run_tasks(
    engine: Engine,
    harness: Harness,
    folder: Path,
    *,
    limit: int | None = None,
    chat: bool | None = None,
    batch_size: int = 1,
    allow_code: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run loaded tasks into a folder of results, or finish what is there; returns what `lm_eval.json` holds.

    Raises:
        ValueError: the folder holds results of something else, another process works in it, or it cannot be
            written; see `OpenSALALM`.
    """
    with FolderLock(folder), write_errors(folder, "run the same command again"):
        return _run_tasks(engine, harness, folder, limit, chat, batch_size, allow_code, quiet)


def _run_tasks(
    engine: Engine,
    harness: Harness,
    folder: Path,
    limit: int | None,
    chat: bool | None,
    batch_size: int,
    allow_code: bool,
    quiet: bool,
) -> dict[str, Any]:
    import lm_eval

    from .requests import ResumingLM

    uses_chat = bool(engine.tokenizer.chat_template) if chat is None else chat
    version = importlib.metadata.version("lm_eval")
    settings = {f"lm-eval: {name}": {"source": f"lm-eval {version}", "seed": _SEED} for name in harness.names}
    Results(
        folder, identity(engine, uses_chat) | {"thoughts stripped": False}, settings, circumstances(engine)
    )
    model = ResumingLM(engine, batch_size=batch_size, log=folder / "requests.jsonl")
    if model.log and not quiet:
        print(f"going on: {folder} holds {len(model.log)} answers", file=sys.stderr)
    with (
        contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    ):  # lm-eval's bars have no switch
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=harness.tasks,
            task_manager=harness.manager,
            limit=limit,
            apply_chat_template=uses_chat,
            bootstrap_iters=1000,
            log_samples=True,
            confirm_run_unsafe_code=allow_code,
            random_seed=0,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
        )
    return _write(found, folder)


def _write(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Figures and samples into the folder, beside those of tasks that were run before."""
    held = read_figures(folder)
    for key in ("results", "groups", "versions", "n-shot", "n-samples", "configs"):
        held[key] = held.get(key, {}) | found.get(key, {})
    held["config"], held["higher_is_better"] = (
        found.get("config", {}),
        held.get("higher_is_better", {}) | found.get("higher_is_better", {}),
    )
    (folder / "lm_eval.json").write_text(
        json.dumps(held, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )
    samples = {(row["task"], row["doc_id"], row["filter"]): row for row in _held_samples(folder)}
    for task, rows in found.get("samples", {}).items():
        for row in rows:
            kept = {
                k: row[k]
                for k in (
                    "doc_id",
                    "filter",
                    "target",
                    "resps",
                    "filtered_resps",
                    "doc_hash",
                    "prompt_hash",
                    *row["metrics"],
                )
            }
            samples[task, row["doc_id"], row["filter"]] = {
                "id": f"{task}/{row['doc_id']}",
                "task": task,
                **kept,
            }
    (folder / "lm_eval_samples.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in samples.values()),
        encoding="utf-8",
    )
    return held


def read_figures(folder: Path) -> dict[str, Any]:
    """What `lm_eval.json` of a folder holds; empty if there is none. ValueError if it is not JSON."""
    path = folder / "lm_eval.json"
    if not path.exists():
        return {}
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(figures, dict) or not isinstance(figures.get("results", {}), dict):
        raise ValueError(f"{path}: must be an object with the field 'results'")
    return figures


def _held_samples(folder: Path) -> list[dict[str, Any]]:
    path = folder / "lm_eval_samples.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if path.exists()
        else []
    )
