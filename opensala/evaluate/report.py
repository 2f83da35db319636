"""A report from folders of results, as Markdown and as one HTML file: the published tables with ours, every
task's scores, and pictures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs import write_errors
from .harness import read_figures
from .html import to_html
from .nolima import BASE_LENGTHS, effective_length
from .plots import depth_map, length_curves
from .published import LONG, MODELS, ULTRA, ULTRA_LENGTHS
from .results import read_header, read_samples, summarize
from .standard import standard_scores, standard_table
from .tables import figures_table, length_name, row, score_table

_TASKS = 13
_TITLES = {
    "ruler": "RULER",
    "mrcr_2needle": "MRCR, 2 needles",
    "mrcr_4needle": "MRCR, 4 needles",
    "mrcr_8needle": "MRCR, 8 needles",
    "nolima": "NoLiMa",
}


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write `report.md`, its pictures, and `report.html` with the pictures inside, into `output`; returns the
    former's path.

    Raises:
        ValueError: a folder without results; no matplotlib; an output that cannot be written.
    """
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        return _write(folders, output)


def _write(folders: Sequence[Path], output: Path) -> Path:
    parts, details = ["# Evaluation", ""], list[str]()
    ours: dict[str, dict[str, Any]] = {}
    standard: dict[str, dict[str, float]] = {}
    for n, folder in enumerate(folders, 1):
        header, rows, figures = read_header(folder), read_samples(folder), read_figures(folder)
        if not rows and not figures:
            raise ValueError(f"{folder}: no samples in it yet; run `opensala eval -o {folder}` first")
        summary = summarize(rows)
        name = _unique(_name(header, folder), ours)
        ours[name] = summary
        if scores := standard_scores(summary, figures):
            standard[name] = scores
        details += [
            f"## {name}",
            "",
            *_description(header, summary, folder),
            "",
            figures_table(figures),
            "",
            score_table(summary),
            "",
            *_pictures(name, rows, summary, output, n),
            *_effective(summary),
        ]
    parts += (standard_table(standard) if standard else []) + _published(ours) + details
    path = output / "report.md"
    text = re.sub("\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".html").write_text(to_html(text, output, "Evaluation"), encoding="utf-8")
    return path


def paper_tables(name: str, summary: dict[str, Any], figures: dict[str, Any]) -> str:
    """The paper's tables that one run has something for, with its row or column, as Markdown; empty if there
    are none."""
    scores = standard_scores(summary, figures)
    lines = [*(standard_table({name: scores}) if scores else []), *_published({name: summary})]
    return "\n".join(lines).rstrip()


def _name(header: dict[str, Any], folder: Path) -> str:
    runs = header.get("runs") or [{}]
    return Path(str(runs[-1].get("name", folder.name))).name


def _unique(name: str, taken: dict[str, Any]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def _description(header: dict[str, Any], summary: dict[str, Any], folder: Path) -> list[str]:
    identity, run = header["identity"], (header.get("runs") or [{}])[-1]
    lines = [
        f"- model {identity.get('model')}, tokenizer {identity.get('tokenizer')}, "
        f"{run.get('parameters', 0):,} parameters",
        f"- {identity.get('dtype')}, keys and values in {identity.get('keys and values', 'the same')}, "
        f"attention mode {identity.get('attention mode')}, block search {identity.get('block search')}, "
        f"{'chat template' if identity.get('chat template') else 'no chat template'}, "
        f"{identity.get('decoding')} decoding",
        f"- {run.get('machine')}, {run.get('device')}, torch {run.get('torch')}, transformers "
        f"{run.get('transformers')}, "
        f"opensala {run.get('opensala')}, last run {run.get('time')}",
    ]
    lines += [
        f"- {name}: " + ", ".join(f"{k} {v}" for k, v in settings.items())
        for name, settings in header["suites"].items()
    ]
    if summary["prompt_tokens"]:
        lines.append(
            f"- {summary['read_tokens']:,} of {summary['prompt_tokens']:,} prompt tokens were read; the "
            "rest was shared between questions "
            "about one document"
        )
    files = [name for name in ("samples.jsonl", "lm_eval_samples.jsonl") if (folder / name).exists()]
    lines.append(
        f"- every prompt's id, answer and score: {', '.join(f'`{folder.name}/{name}`' for name in files)}"
    )
    return lines


def _averages(summary: dict[str, Any], key: str) -> dict[int, tuple[float, int]]:
    """Score and number of tasks by length, of a suite or of one task of MRCR."""
    suites = summary["suites"]
    if key.startswith("mrcr_"):
        cells = suites.get("mrcr", {}).get("tasks", {}).get(key, {})
        return {int(n): (c["score"], 1) for n, c in cells.items()}
    return {int(n): (c["score"], c["tasks"]) for n, c in suites.get(key, {}).get("average", {}).items()}


def _published(ours: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for key, columns in LONG.items():
        found = {name: _averages(summary, key) for name, summary in ours.items()}
        if not any(found.values()):
            continue
        extra = sorted(
            {n for scores in found.values() for n in scores}
            - set(columns)
            - set(ULTRA_LENGTHS if key == "ruler" else ())
        )
        lengths = [*extra, *columns] if not extra or extra[0] < min(columns) else [*columns, *extra]
        lines += [
            f"## {_TITLES[key]}",
            "",
            row("", *(length_name(n) for n in lengths)),
            "|---" + "|---:" * len(lengths) + "|",
        ]
        for i, model in enumerate(MODELS):
            lines.append(
                row(
                    f"{model} (published)", *(f"{columns[n][i]:.1f}" if n in columns else "" for n in lengths)
                )
            )
        lines += [_own(name, scores, lengths, key) for name, scores in found.items()]
        if key == "ruler":
            lines += [
                "",
                row("beyond 128K", *(length_name(n) for n in ULTRA_LENGTHS)),
                "|---" + "|---:" * len(ULTRA_LENGTHS) + "|",
            ]
            lines += [
                row(f"{m} (published)", *("" if s is None else f"{s:.1f}" for s in scores))
                for m, scores in ULTRA.items()
            ]
            lines += [_own(name, scores, list(ULTRA_LENGTHS), key) for name, scores in found.items()]
            lines += [
                "",
                "The published rows used RULER's own text. Unless the data came from RULER's files, ours "
                "has the same task types and "
                "parameters in other words, so the figures compare in kind, not digit by digit. A number "
                "in brackets says how many of "
                f"the {_TASKS} tasks an average covers when it is not all of them.",
            ]
        lines.append("")
    return lines


def _own(name: str, scores: dict[int, tuple[float, int]], lengths: list[int], key: str) -> str:
    def cell(length: int) -> str:
        if length not in scores:
            return ""
        score, tasks = scores[length]
        return f"**{score:.1f}**" + (f" ({tasks})" if key == "ruler" and tasks != _TASKS else "")

    return row(f"**{name}**", *(cell(n) for n in lengths))


def _pictures(
    name: str, rows: list[dict[str, Any]], summary: dict[str, Any], output: Path, number: int
) -> list[str]:
    lines: list[str] = []
    for suite, table in summary["suites"].items():
        if set(table["average"]) == {"0"}:  # no lengths: nothing to draw over them
            continue
        curves = {
            task: {int(n): c["score"] for n, c in cells.items()} for task, cells in table["tasks"].items()
        }
        if len(curves) > 1:
            curves["average"] = {int(n): c["score"] for n, c in table["average"].items()}
        file = f"{suite}-lengths-{number}.png"
        length_curves(curves, f"{_TITLES.get(suite, suite)}, {name}", output / file)
        lines += [f"![{suite} by length]({file})", ""]
        file = f"{suite}-depths-{number}.png"
        if depth_map(
            [r for r in rows if r["suite"] == suite],
            f"{_TITLES.get(suite, suite)}, tasks with one answer: {name}",
            output / file,
        ):
            lines += [f"![{suite} by depth and length]({file})", ""]
    return lines


def _effective(summary: dict[str, Any]) -> list[str]:
    scores = {n: s for n, (s, _) in _averages(summary, "nolima").items()}
    if not set(scores) & set(BASE_LENGTHS):
        return []
    base, effective = effective_length(scores)
    return [
        f"NoLiMa base score {base:.1f}; effective length (at least 85% of it at every length): "
        f"{'none' if effective is None else length_name(effective)}.",
        "",
    ]
