"""The paper's table of standard benchmarks (Table 2): which of lm-eval's tasks and figures stand for its
rows.

The paper used OpenCompass and did not publish prompts or settings; lm-eval's tasks are the nearest there are.
Known
differences: its MBPP has 257 problems, lm-eval's 500; its AIME figures are multiples of 1/480, so 16 answers
    to each problem.
"""

from dataclasses import dataclass
from typing import Any

from .published import STANDARD, STANDARD_MODELS
from .tables import row


@dataclass(frozen=True)
class Benchmark:
    """A row of the table: its title in the paper, lm-eval's task and the figure of it, and whether it runs
    programs."""

    title: str
    task: str
    figure: str
    runs_code: bool = False


BENCHMARKS = (
    Benchmark("CMMLU", "cmmlu", "acc,none"),
    Benchmark("MMLU-Pro", "mmlu_pro", "exact_match,custom-extract"),
    Benchmark("HumanEval", "humaneval", "pass@1,create_test", True),
    Benchmark("MBPP", "mbpp", "pass_at_1,none", True),
    Benchmark("AIME24", "aime24", "exact_match,none"),
    Benchmark("AIME25", "aime25", "exact_match,none"),
    Benchmark("BBH", "bbh_cot_fewshot", "exact_match,get-answer"),
    Benchmark("IFEval", "ifeval", "prompt_level_strict_acc,none"),
)
NO_LEAVE = (
    "runs programs that the model writes; allow it with --allow-code-execution (they run in a process of "
    "their own, without rights "
    "and with limits)"
)
LIVECODEBENCH = {"LCB-v5": "livecodebench_v5", "LCB-v6": "livecodebench_v6"}


def standard_scores(summary: dict[str, Any], figures: dict[str, Any]) -> dict[str, float]:
    """Scores from 0 to 100 by the paper's titles, as far as a folder of results has them.

    Args:
        summary: of the suites that are ours (`results.summarize`), for LiveCodeBench.
        figures: what `lm_eval.json` holds.
    """
    results = figures.get("results", {})
    found = {
        b.title: 100 * float(results[b.task][b.figure])
        for b in BENCHMARKS
        if b.figure in results.get(b.task, {})
    }
    tasks = summary["suites"].get("livecodebench", {}).get("tasks", {})
    return found | {
        title: cell["score"] for title, task in LIVECODEBENCH.items() for cell in tasks.get(task, {}).values()
    }


def standard_table(ours: dict[str, dict[str, float]]) -> list[str]:
    """The paper's table with a column for each of ours; the average stands only where all ten are there."""
    lines = [
        "## Standard benchmarks",
        "",
        row("", *(f"{m} (published)" for m in STANDARD_MODELS), *(f"**{name}**" for name in ours)),
        "|---" + "|---:" * (len(STANDARD_MODELS) + len(ours)) + "|",
    ]
    for title, published in STANDARD.items():
        if title == "Average":
            mine = [
                f"{sum(s.values()) / len(s):.2f}" if len(s) == len(STANDARD) - 1 else ""
                for s in ours.values()
            ]
        else:
            mine = [f"**{s[title]:.2f}**" if title in s else "" for s in ours.values()]
        lines.append(row(title, *(f"{p:.2f}" for p in published), *mine))
    return [
        *lines,
        "",
        "The published figures were made with OpenCompass, whose prompts and settings the paper does not "
        "give; ours are lm-eval's tasks "
        "as they come, and LiveCodeBench in our own wording, so they compare in kind. lm-eval's MBPP has "
        "500 problems, the paper's 257; "
        "the paper's AIME figures are means over 16 answers to each problem, lm-eval's take one.",
        "",
    ]
