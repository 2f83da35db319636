"""Tasks of lm-eval in place of the built-in probes, where that is installed."""

import importlib.util
from typing import Any

from ..model import MiniCPMSALAForCausalLM


def require_lm_eval() -> None:
    """Raise ValueError with the command to run if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks of lm-eval need the package: pip install 'opensala[eval]' (the built-in probes need "
            "nothing)"
        )


def lm_eval_score(model: MiniCPMSALAForCausalLM, tokenizer: Any, tasks: tuple[str, ...], batch: int) -> float:
    """Mean over tasks of each one's first metric (normalised accuracy where a task has it)."""
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped, scores = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch), []
    for task in tasks:
        try:
            results = simple_evaluate(wrapped, tasks=[task], bootstrap_iters=0)
        except KeyError as error:
            raise ValueError(f"lm-eval task {task!r}: {error.args[0]}") from error
        assert results is not None, "lm-eval returns results on the first process"
        found = results["results"]
        names = (
            [task] if task in found else sorted(found)
        )  # a file is known by the name inside it, a group by its tasks
        scores.append(sum(task_metric(name, found[name]) for name in names) / len(names))
    return sum(scores) / len(scores)


def task_metric(task: str, values: dict[str, Any]) -> float:
    """The figure of a task, from what lm-eval reports for it: normalised accuracy, else its first number."""
    numbers = {
        key: value
        for key, value in values.items()
        if isinstance(value, (int, float))
        and "stderr" not in key
        and key not in ("sample_len", "sample_count")
    }
    for key in ("acc_norm,none", *numbers):
        if key in numbers:
            return float(numbers[key])
    raise ValueError(f"lm-eval task {task!r} reports no number: {sorted(values)}")
