"""What replacing a layer costs: recall (facts hidden in a document), general ability (held-out text),
divergence.

The built-in probes need nothing but the tokenizer; tasks of lm-eval can be scored instead, where it is
installed.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..model.config import LIGHTNING
from .batches import Batches
from .config import Probes
from .distill import final_states
from .kl import chunked_kl

_ROWS = 2048  # tokens whose logits exist at once


@dataclass(frozen=True)
class Score:
    """recall: share of answers whose every token is the most likely one. nll, accuracy: of held-out text, per
    token.

    `general` is what enters the selection as C: -nll, or the mean of lm-eval tasks.
    """

    recall: float
    general: float
    nll: float
    accuracy: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@contextmanager
def replaced(model: MiniCPMSALAForCausalLM, mixers: dict[int, nn.Module]) -> Iterator[None]:
    """Within the block, layers of the model use these Lightning mixers instead of their own, with a cache or
    without."""
    layers, types = model.model.layers, model.config.mixer_types
    own = {i: layers[i].get_submodule("self_attn") for i in mixers}
    try:
        for i, mixer in mixers.items():
            layers[i].self_attn = mixer
        model.config.mixer_types = [LIGHTNING if i in mixers else name for i, name in enumerate(types or ())]
        yield
    finally:
        model.config.mixer_types = types
        for i, mixer in own.items():
            layers[i].self_attn = mixer


@torch.no_grad()
def token_scores(model: MiniCPMSALAForCausalLM, ids: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """For every token of ids `[N, T]` but the first: its negative log-likelihood, and whether it was the most
    likely one.

    Both `[N, T - 1]`, on the CPU.
    """
    losses, right = [], []
    for rows in ids.to(model.device).split(batch):
        states, targets = (
            final_states(model, rows).unflatten(0, rows.shape)[:, :-1].flatten(0, 1),
            rows[:, 1:].flatten(),
        )
        for s, target in zip(states.split(_ROWS), targets.split(_ROWS), strict=True):
            logits = model.lm_head(s).float()
            losses.append(nn.functional.cross_entropy(logits, target, reduction="none").cpu())
            right.append((logits.argmax(-1) == target).cpu())
    shape = (ids.shape[0], ids.shape[1] - 1)
    return torch.cat(losses).view(shape), torch.cat(right).view(shape)


def answers_right(right: Tensor, answer: Tensor) -> list[bool]:
    """Per hidden fact, whether all tokens of its value were right.

    Args:
        right: `[N, T - 1]` as of `token_scores`.
        answer: `[N, T]` marks on the answers, each ended by an end-of-text, which does not count.
    """
    found = []
    for row, marks in zip(right.tolist(), answer[:, 1:].tolist(), strict=True):
        start = None
        for n, marked in enumerate([*marks, False]):
            if marked and start is None:
                start = n
            elif not marked and start is not None:
                found.append(all(row[start : n - 1]))
                start = None
    return found


class Prober:
    """Scores models on fixed probes."""

    def __init__(self, batches: Batches, probes: Probes) -> None:
        self.probes, self.tokenizer = probes, batches.tokenizer
        self.facts = batches.recall_probes(probes.length, probes.sequences)
        self.text = batches.text_probes(probes.sequences)
        if probes.recall_tasks or probes.general_tasks:
            require_lm_eval()

    def recall(self, model: MiniCPMSALAForCausalLM, facts: tuple[Tensor, Tensor] | None = None) -> float:
        """Share of facts found; of other probes than the own ones if given."""
        ids, marks = facts or self.facts
        found = answers_right(token_scores(model, ids, self.probes.batch)[1], marks)
        return sum(found) / len(found)

    def builtin(self, model: MiniCPMSALAForCausalLM) -> Score:
        """The score on the built-in probes."""
        losses, right = token_scores(model, self.text, self.probes.batch)
        nll, accuracy = losses.mean().item(), right.float().mean().item()
        return Score(self.recall(model), -nll, nll, accuracy)

    def score_some(self, model: MiniCPMSALAForCausalLM) -> None:
        """The work of one batch of each kind of probes."""
        for ids in (self.text, self.facts[0]):
            token_scores(model, ids[: self.probes.batch], self.probes.batch)

    def score(self, model: MiniCPMSALAForCausalLM) -> Score:
        """The score that layers are chosen by: the built-in one, or tasks of lm-eval in its place."""
        own = self.builtin(model)
        recall, general = own.recall, own.general
        if self.probes.recall_tasks:
            recall = lm_eval_score(model, self.tokenizer, self.probes.recall_tasks, self.probes.batch)
        if self.probes.general_tasks:
            general = lm_eval_score(model, self.tokenizer, self.probes.general_tasks, self.probes.batch)
        return Score(recall, general, own.nll, own.accuracy)

    @torch.no_grad()
    def kl(self, teacher: MiniCPMSALAForCausalLM, student: MiniCPMSALAForCausalLM) -> float:
        """Mean KL per token from the teacher on held-out text."""
        total = 0.0
        for ids in self.text.to(teacher.device).split(self.probes.batch):
            states = (final_states(student, ids), student.lm_head.weight)
            target = (final_states(teacher, ids), teacher.lm_head.weight)
            total += chunked_kl(*states, *target).item() * ids.numel()
        return total / self.text.numel()

    @torch.no_grad()
    def divergence(self, teacher: MiniCPMSALAForCausalLM, mixers: dict[int, nn.Module]) -> float:
        """Mean KL per token from the teacher, with these mixers in it, on both kinds of probes."""
        total, count = 0.0, 0
        for ids in (*self.facts[0].split(self.probes.batch), *self.text.split(self.probes.batch)):
            ids = ids.to(teacher.device)
            target = final_states(teacher, ids)
            with replaced(teacher, mixers):
                states = final_states(teacher, ids)
            total += (
                chunked_kl(states, teacher.lm_head.weight, target, teacher.lm_head.weight).item()
                * ids.numel()
            )
            count += ids.numel()
        return total / count


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
