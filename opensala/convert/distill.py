"""End-to-end distillation: KL(teacher || student) of the next-token distributions, token by token.

Logits of a large vocabulary are never whole in memory: they are formed in pieces of the vocabulary from final
hidden states, in the backward pass again. So a teacher's logits can also be kept on disk exactly, as its
final hidden states.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import LightningMixer
from .align import CLIP, new_optimizer
from .config import Phase

_ELEMENTS = 1 << 24  # logits of one piece
Targets = Callable[[int, Tensor], Tensor]


class _ChunkedKL(torch.autograd.Function):
    """Sum over tokens of KL(softmax(t Wt') || softmax(s Ws')), with gradients for s and Ws."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, ws: Tensor, t: Tensor, wt: Tensor, chunk: int) -> Tensor:
        rows, low = s.shape[0], torch.finfo(torch.float32).min
        top_s, top_t = (
            s.new_full((rows,), low, dtype=torch.float32),
            s.new_full((rows,), low, dtype=torch.float32),
        )
        sum_s, sum_t, cross = torch.zeros_like(top_s), torch.zeros_like(top_s), torch.zeros_like(top_s)
        for a in range(0, ws.shape[0], chunk):
            ls, lt = _logits(s, ws, a, chunk), _logits(t, wt, a, chunk)
            new_s, new_t = torch.maximum(top_s, ls.amax(1)), torch.maximum(top_t, lt.amax(1))
            sum_s = sum_s * (top_s - new_s).exp() + (ls - new_s[:, None]).exp().sum(1)
            weight, shrink = (lt - new_t[:, None]).exp(), (top_t - new_t).exp()
            sum_t = sum_t * shrink + weight.sum(1)
            cross = cross * shrink + (weight * (lt - ls)).sum(1)
            top_s, top_t = new_s, new_t
        lse_s, lse_t = top_s + sum_s.log(), top_t + sum_t.log()
        ctx.save_for_backward(s, ws, t, wt, lse_s, lse_t)
        ctx.chunk = chunk
        return (cross / sum_t - lse_t + lse_s).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s, ws, t, wt, lse_s, lse_t = ctx.saved_tensors
        ds = torch.zeros(s.shape, dtype=torch.float32, device=s.device)
        dw = torch.zeros(ws.shape, dtype=torch.float32, device=s.device) if ctx.needs_input_grad[1] else None
        for a in range(0, ws.shape[0], ctx.chunk):
            d = (_logits(s, ws, a, ctx.chunk) - lse_s[:, None]).exp() - (
                _logits(t, wt, a, ctx.chunk) - lse_t[:, None]
            ).exp()
            d *= grads[0]
            ds += d @ ws[a : a + ctx.chunk].float()
            if dw is not None:
                dw[a : a + ctx.chunk] = d.T @ s.float()
        return ds.to(s.dtype), None if dw is None else dw.to(ws.dtype), None, None, None


def _logits(x: Tensor, weight: Tensor, start: int, chunk: int) -> Tensor:
    return x.float() @ weight[start : start + chunk].float().T


def chunked_kl(s: Tensor, ws: Tensor, t: Tensor, wt: Tensor, chunk: int | None = None) -> Tensor:
    """Mean KL(softmax(t Wt') || softmax(s Ws')) over tokens, computed in float32.

    Args:
        s, t: final hidden states of student and teacher, `[N, D]` each with its own D.
        ws, wt: their heads, `[V, D]`.
        chunk: vocabulary entries at a time; what fits 64 MB if None.

    Gradients flow to s and ws.
    """
    if ws.shape[0] != wt.shape[0]:
        raise ValueError(
            f"student and teacher must share a vocabulary, got {ws.shape[0]} and {wt.shape[0]} entries"
        )
    chunk = chunk or max(64, _ELEMENTS // max(1, s.shape[0]))
    return _ChunkedKL.apply(s, ws, t.detach(), wt.detach(), chunk) / s.shape[0]


def final_states(model: MiniCPMSALAForCausalLM, ids: Tensor) -> Tensor:
    """What the head of the model multiplies, `[B * T, D]`."""
    return (
        model.model(input_ids=ids, use_cache=False).last_hidden_state / model.config.logit_divisor
    ).flatten(0, 1)


def live_targets(teacher: MiniCPMSALAForCausalLM) -> Targets:
    """The teacher's final states, computed when asked for."""

    def targets(_step: int, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return final_states(teacher, ids)

    return targets


def cached_targets(folder: Path) -> Targets:
    """The teacher's final states of each step, from files that `cache_step` wrote."""
    return lambda step, ids: load_file(folder / f"{step:07}.safetensors", device=str(ids.device))["states"]


def cache_step(teacher: MiniCPMSALAForCausalLM, folder: Path, step: int, ids: Tensor) -> None:
    """Write the teacher's final states of a step, unless they are there."""
    file = folder / f"{step:07}.safetensors"
    if not file.exists():
        partial = file.with_suffix(".partial")
        save_file({"states": live_targets(teacher)(step, ids).contiguous().cpu()}, partial)
        partial.replace(file)


class Distillation:
    """A student, what is trainable of it, and its optimizer.

    Args:
        trainable: `linear` (the Lightning mixers; everything else is frozen) or `all`.
        targets: the teacher's final states of a step.
        head: the teacher's head, `[V, D]`.
    """

    def __init__(
        self, student: MiniCPMSALAForCausalLM, trainable: str, targets: Targets, head: Tensor, phase: Phase
    ) -> None:
        self.student, self.targets, self.head, self.phase = student, targets, head, phase
        student.requires_grad_(trainable == "all")
        for module in student.modules():
            if isinstance(module, LightningMixer):
                module.requires_grad_(True)
        self.parameters: list[nn.Parameter] = [p for p in student.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"trainable = {trainable!r} leaves nothing to train: every layer is kept")
        self.optimizer = new_optimizer(self.parameters, phase.lr)

    def gradients(self, step: int, ids: Tensor) -> float:
        """Run a batch `[B, T]`, leave the gradients in place, return the mean KL per token in nats."""
        loss = chunked_kl(
            final_states(self.student, ids), self.student.lm_head.weight, self.targets(step, ids), self.head
        )
        loss.backward()
        return loss.item()

    def clip(self) -> float:
        """Clip the gradient. Returns the norm it had."""
        return nn.utils.clip_grad_norm_(self.parameters, CLIP).item()

    def update(self, step: int) -> None:
        """Take optimizer step `step` and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.rate(step)
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
