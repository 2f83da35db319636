"""What a model can do: recall (facts hidden in a document), general ability (held-out text), divergence.

The built-in probes need nothing but the tokenizer; tasks of lm-eval can be scored instead, where it is
installed. Rows are shared out over the ranks.

Shapes: N rows, n of them this rank's, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..model.config import LIGHTNING
from ..parallel import whole_tensor, with_whole_weights
from .batches import Batches
from .benchmarks import lm_eval_score, require_lm_eval
from .config import Probes
from .kl import chunked_kl
from .ranks import Ranks

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


class Stream:
    """Probes on their way through a model: this rank's rows, before layer `at`.

    Args:
        ids: all rows `[N, T]`; marks: on answers, `[N, T]`, or None.
        ranks: who share the rows; batch: rows of a pass.
    """

    def __init__(self, ids: Tensor, batch: int, ranks: Ranks, device: torch.device) -> None:
        self.count, self.batch, self.ranks = len(ids), batch, ranks
        self.ids = ranks.own(ids).to(device)
        self.x: Tensor | None = None
        self.at = 0

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Ids and states of the rows of each pass."""
        states = [None] * self.count if self.x is None else self.x.split(self.batch)
        yield from zip(self.ids.split(self.batch), states, strict=False)

    @torch.no_grad()
    def advance(self, model: MiniCPMSALAForCausalLM, stop: int) -> None:
        """Through the model's layers up to `stop`: what lies before is not computed again."""
        if stop > self.at:
            passed = [with_whole_weights(model, _through, *part, self.at, stop) for part in self.parts()]
            self.x, self.at = torch.cat(passed), stop

    def gather(self, parts: list[Tensor]) -> Tensor:
        """Results of this rank's rows, pass by pass: those of all rows, on the CPU."""
        return self.ranks.gather(torch.cat(parts), self.count).cpu()


def _through(
    model: MiniCPMSALAForCausalLM, ids: Tensor, x: Tensor | None, start: int, stop: int | None
) -> Tensor:
    """Hidden states before layer `stop` (normalised ones behind the last if None) from those before `start`;
    from ids where there are none yet."""
    return model.model.read_layers(model.model.embed(ids) if x is None else x, start, stop)


def last_states(model: MiniCPMSALAForCausalLM, ids: Tensor, x: Tensor | None = None, at: int = 0) -> Tensor:
    """What the head multiplies, `[B, T, D]`, from the states before layer `at` on."""
    return _through(model, ids, x, at, None) / model.config.logit_divisor


def _token_scores(
    model: MiniCPMSALAForCausalLM, ids: Tensor, x: Tensor | None, at: int
) -> tuple[Tensor, Tensor]:
    losses, right = [], []
    states, targets = last_states(model, ids, x, at)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    for s, target in zip(states.split(_ROWS), targets.split(_ROWS), strict=True):
        logits = model.lm_head(s).float()
        losses.append(nn.functional.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    shape = (ids.shape[0], ids.shape[1] - 1)
    return torch.cat(losses).view(shape), torch.cat(right).view(shape)


def _divergences(
    model: MiniCPMSALAForCausalLM,
    ids: Tensor,
    x: Tensor | None,
    at: int,
    target: Tensor,
    head: Tensor,
) -> Tensor:
    """Mean KL per token of each row `[B]`, from final states `[B, T, D]` and the head of another model."""
    states, own = last_states(model, ids, x, at), model.lm_head.weight
    return torch.stack([chunked_kl(s, own, t, head) for s, t in zip(states, target, strict=True)])


@torch.no_grad()
def stream_scores(model: MiniCPMSALAForCausalLM, stream: Stream) -> tuple[Tensor, Tensor]:
    """For every token of a stream's rows but the first: its negative log-likelihood, and whether it was the
    most likely one. Both `[N, T - 1]`, on the CPU, of all ranks' rows."""
    found = [with_whole_weights(model, _token_scores, ids, x, stream.at) for ids, x in stream.parts()]
    losses, right = (stream.gather([part[i] for part in found]) for i in (0, 1))
    return losses, right


@torch.no_grad()
def stream_divergences(
    model: MiniCPMSALAForCausalLM, stream: Stream, targets: Tensor, head: Tensor
) -> Tensor:
    """Mean KL per token of each of a stream's rows `[N]`, of all ranks' rows.

    Args:
        targets: the final states that it is measured from, of this rank's rows, `[n, T, D]`; head: `[V, D]`.
    """
    pairs = zip(stream.parts(), targets.split(stream.batch), strict=True)
    return stream.gather(
        [with_whole_weights(model, _divergences, ids, x, stream.at, t, head) for (ids, x), t in pairs]
    )


@torch.no_grad()
def stream_states(model: MiniCPMSALAForCausalLM, stream: Stream) -> Tensor:
    """The final states `[n, T, D]` of this rank's rows."""
    return torch.cat([with_whole_weights(model, last_states, ids, x, stream.at) for ids, x in stream.parts()])


def token_scores(model: MiniCPMSALAForCausalLM, ids: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """`stream_scores` of ids `[N, T]`, on one process."""
    return stream_scores(model, Stream(ids, batch, Ranks(), model.device))


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
    """Scores models on fixed probes, which the ranks share."""

    def __init__(self, batches: Batches, probes: Probes, ranks: Ranks | None = None) -> None:
        self.probes, self.tokenizer, self.ranks = probes, batches.tokenizer, ranks or Ranks()
        self.facts = batches.recall_probes(probes.length, probes.sequences)
        self.text = batches.text_probes(probes.sequences)
        if probes.recall_tasks or probes.general_tasks:
            require_lm_eval()

    def streams(self, device: torch.device) -> tuple[Stream, Stream]:
        """Documents with hidden facts, and held-out text."""
        facts, text = (
            Stream(ids, self.probes.batch, self.ranks, device) for ids in (self.facts[0], self.text)
        )
        return facts, text

    def asked(self) -> list[int]:
        """Facts in each document."""
        return [len(found) for found in self.found(torch.ones_like(self.facts[1][:, 1:], dtype=torch.bool))]

    def found(self, right: Tensor) -> list[list[bool]]:
        """Of each document's facts, whether each was found; right `[N, T - 1]` as of `stream_scores`."""
        return [answers_right(r[None], m[None]) for r, m in zip(right, self.facts[1], strict=True)]

    def builtin(self, model: MiniCPMSALAForCausalLM) -> Score:
        """The score on the built-in probes."""
        facts, text = self.streams(model.device)
        losses, right = stream_scores(model, text)
        found = sum(self.found(stream_scores(model, facts)[1]), [])
        nll, accuracy = losses.mean().item(), right.float().mean().item()
        return Score(sum(found) / len(found), -nll, nll, accuracy)

    def score_some(self, model: MiniCPMSALAForCausalLM) -> None:
        """The work of one batch of each kind of probes."""
        for ids in (self.text, self.facts[0]):
            rows = ids[: self.probes.batch * self.ranks.world]
            stream_scores(model, Stream(rows, self.probes.batch, self.ranks, model.device))

    def benchmarks(self, model: MiniCPMSALAForCausalLM, own: Score) -> Score:
        """The score that layers are chosen by: the built-in one, tasks of lm-eval in its place where there
        are any. Every rank goes through all of them: the weights of a sharded model take all."""
        recall, general = own.recall, own.general
        if self.probes.recall_tasks:
            recall = lm_eval_score(model, self.tokenizer, self.probes.recall_tasks, self.probes.batch)
        if self.probes.general_tasks:
            general = lm_eval_score(model, self.tokenizer, self.probes.general_tasks, self.probes.batch)
        return Score(recall, general, own.nll, own.accuracy)

    def kl(self, teacher: MiniCPMSALAForCausalLM, student: MiniCPMSALAForCausalLM) -> float:
        """Mean KL per token from the teacher on held-out text."""
        _, text = self.streams(teacher.device)
        head = whole_tensor(teacher.lm_head.weight)
        return stream_divergences(student, text, stream_states(teacher, text), head).mean().item()
