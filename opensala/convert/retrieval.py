"""Which layers of a teacher copy: where its heads look while it writes a fact that stands in the text.

A layer whose heads attend from the place that predicts a token of an answer to that very token in the text
carries recall (retrieval heads, arXiv 2404.15574). It takes one pass of the teacher over the probes, and no
mixers; on a real teacher it names layers that a loss does not (docs/log.md, SmolLM2-135M).

Shapes: T tokens, H query heads, D head dim, P pairs of places.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import SparseMixer
from ..model.layout import SequenceLayout
from ..parallel import with_whole_weights
from .calibrate import dense_layout, read_whole, watched_attentions


class Copies(NamedTuple):
    """Pairs of places in a text `[P]`: one that predicts a token, and the earlier one that holds it."""

    predicts: list[int]
    holds: list[int]


def find_copies(ids: list[int], marks: list[bool]) -> Copies:
    """Pairs for every marked answer whose tokens, but for the end-of-text behind them, stand earlier in the
    text; the nearest place counts."""
    predicts: list[int] = []
    holds: list[int] = []
    for start, end in _runs(marks):
        answer = ids[start : end - 1]
        place = next(
            (i for i in range(start - len(answer), -1, -1) if ids[i : i + len(answer)] == answer), -1
        )
        if answer and place >= 0 and start:
            predicts += range(start - 1, end - 2)
            holds += range(place, place + len(answer))
    return Copies(predicts, holds)


def _runs(marks: list[bool]) -> Iterator[tuple[int, int]]:
    """Bounds of each run of marks."""
    start = None
    for i, marked in enumerate([*marks, False]):
        if marked and start is None:
            start = i
        elif not marked and start is not None:
            yield start, i
            start = None


@torch.no_grad()
def retrieval_scores(teacher: MiniCPMSALAForCausalLM, ids: Tensor, marks: Tensor) -> list[float]:
    """For each layer, the attention of its best head to what is copied, mean over all copied tokens.

    Args:
        teacher: a Transformer as `load_teacher` gives it, every layer softmax attention; if it is sharded,
            every rank reads all texts.
        ids: texts with questions and answers, `[N, T]`.
        marks: `[N, T]`, true on the answers' tokens, each answer ended by an end-of-text.

    Raises:
        ValueError: no answer stands in its text.
    """
    sums: list[Tensor | None] = [None] * len(teacher.model.layers)
    count = 0
    for row, marked in zip(ids.tolist(), marks.tolist(), strict=True):
        copies = find_copies(row, marked)
        if not copies.predicts:
            continue
        count += len(copies.predicts)
        tokens = torch.tensor([row], device=teacher.device)
        layout = dense_layout(teacher, tokens)

        def watch(
            n: int, x: Tensor, _output: Tensor, layout: SequenceLayout = layout, copies: Copies = copies
        ) -> None:
            mixer = teacher.model.layers[n].get_submodule("self_attn")
            assert isinstance(mixer, SparseMixer), "a teacher has no other mixer"
            q, k, _ = mixer.project(x.to(mixer.q_proj.weight.dtype), layout)
            found = _attention(q[0], k[0], copies, mixer.scale).sum(1)
            known = sums[n]
            sums[n] = found if known is None else known + found

        with watched_attentions(teacher, watch):
            with_whole_weights(teacher, read_whole, tokens)
    if not count:
        raise ValueError("retrieval: no answer of the probes stands in its text, so nothing can be copied")
    return [float(x.max()) / count for x in sums if x is not None]


def _attention(q: Tensor, k: Tensor, copies: Copies, scale: float) -> Tensor:
    """The weights `[H, P]` of each head on the places that hold, from those that predict.

    q `[T, H, D]`, k `[T, Hkv, D]`.
    """
    places = torch.tensor(copies.predicts, device=q.device)
    wanted = torch.tensor(copies.holds, device=q.device)
    rows = q[places].float().transpose(0, 1)
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("hpd,thd->hpt", rows, keys) * scale
    later = torch.arange(k.shape[0], device=q.device) > places[:, None]
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return weights.gather(2, wanted[None, :, None].expand(q.shape[1], -1, 1))[..., 0]
