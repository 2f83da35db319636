"""No figure without a right answer: every op, in every backend to be timed, against its reference
implementation in float64.

Outputs and gradients on odd shapes, fresh random inputs at each call. The test suite does this far more
thoroughly; here it guards the very process, machine and versions that are about to be timed.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..ops import (
    BlockSpec,
    alibi_slopes,
    lightning_attention,
    norm_gate,
    norm_rope,
    select_blocks,
    sparse_attention,
)
from ..ops.backends import Backend
from ..ops.sparse import num_windows
from ..ops.sparse.select import compress
from ..ops.sparse.spec import LIMIT

SPEC = BlockSpec(window_size=128, topk=5)
# Largest difference over the largest element wanted, outputs and gradients.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# By how much a block that was left out may outscore one that was taken: scores are made from compressed keys
# rounded to the dtype, and where blocks tie (neighbours share a window) either may be taken.
SLACK = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def verify_ops(
    device: torch.device, dtype: torch.dtype, backends: tuple[Backend, ...], shorten: int = 1
) -> list[str]:
    """Run all checks, on texts `shorten` times shorter than usual; returns one line for each op and backend.

    Raises:
        ValueError: an op whose results differ, with the difference.
    """
    lines = []
    for backend in backends:
        for name, check in {
            "lightning_attention": _lightning,
            "sparse_attention": _sparse,
            "norm_rope": _norm_rope,
            "norm_gate": _norm_gate,
        }.items():
            error = check(device, dtype, backend, shorten)
            if not error < TOLERANCE[dtype]:
                raise ValueError(
                    f"{name} is not timed: with backend {backend!r} in {dtype} it differs from the plain "
                    f"statement by {error:.1e}, allowed are {TOLERANCE[dtype]:.0e}"
                )
            lines.append(f"{name}, {backend}: outputs and gradients within {error:.1e} of float64")
        excess = _selection(device, dtype, backend, shorten)
        lines.append(
            f"select_blocks, {backend}: no block left out scores more than {excess:.1e} above one taken, in "
            "float64"
        )
    return lines


def check_lists(q: Tensor, k: Tensor, blocks: Tensor, spec: BlockSpec, rows: Iterable[int]) -> float:
    """Whether block lists are right, by scores in float64; ties may fall either way.

    A list is right if its numbers ascend, padded with -1; if it has as many as there is room for and sight
    of; if the first blocks and the window are among them; and if no block that was left out scores more than
    `1 + SLACK` times one that was taken.

    Args:
        q: queries `[1, T, Hq, D]`, the last T of L positions.
        k: keys `[1, L, Hkv, D]`.
        blocks: `[1, T, Hkv, K]`.
        rows: which of the T queries to look at.

    Returns:
        The largest share by which a block left out outscores one taken (0 if none does).

    Raises:
        ValueError: a list that is wrong, with the token and the reason.
    """
    slack, before = SLACK[q.dtype], k.shape[1] - q.shape[1]
    k1, k2 = (
        compress(k.double(), size, stride)[0].transpose(0, 1)
        for size, stride in ((spec.kernel_size, spec.kernel_stride), (spec.coarse_size, spec.coarse_stride))
    )
    worst = 0.0
    for row in rows:
        scores = block_scores(q[0, row].double(), k1, k2, spec, before + row)
        for head, lists in enumerate(blocks[0, row].long()):
            taken = lists[lists >= 0]
            wanted = min(spec.num_blocks, scores.shape[1])
            if taken.numel() != wanted or (lists[:wanted] < 0).any() or (taken.diff() <= 0).any():
                _wrong_list(before + row, f"{lists.tolist()} is not {wanted} ascending numbers, -1 behind")
            out = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
            if int(taken[-1]) >= scores.shape[1]:
                _wrong_list(before + row, f"block {int(taken[-1])} lies in its future")
            out[taken] = False
            left = scores[head][out]
            if left.numel() and bool(left.max() > scores[head][taken].min()):
                excess = (left.max() / scores[head][taken].min() - 1).item()
                if not excess <= slack:
                    _wrong_list(
                        before + row,
                        f"a block left out scores {excess:.1e} above one taken, {slack:.0e} is allowed",
                    )
                worst = max(worst, excess)
    return worst


def _wrong_list(token: int, why: str) -> None:
    raise ValueError(f"select_blocks is not timed: the list of token {token} is wrong: {why}")


def block_scores(q: Tensor, k1: Tensor, k2: Tensor, spec: BlockSpec, position: int) -> Tensor:
    """Scores `[Hkv, blocks]` of all blocks up to its own for one query `[Hq, D]`; inf for those always taken.

    k1 and k2 are the compressed keys `[Hkv, n, D]`. The same as the reference implementation, of which it is
    the form for long contexts.
    """
    kv_heads, dim = k1.shape[0], q.shape[-1]
    own = position // spec.block_size
    seen = (
        num_windows(position + 1, spec.kernel_size, spec.kernel_stride),
        num_windows(position + 1, spec.coarse_size, spec.coarse_stride),
    )
    query = q.view(kv_heads, -1, dim) / math.sqrt(dim)
    logits = query @ k1[:, : seen[0]].transpose(1, 2)
    reference = query @ k2[:, : seen[1]].transpose(1, 2) if seen[1] else logits
    exponents = (logits - reference.logsumexp(-1, keepdim=True)).clamp(max=LIMIT * math.log(2))
    p = exponents.exp().sum(1)
    ratio = spec.ratio
    padded = torch.full((kv_heads, 1 + ratio * (own + 1)), -math.inf, dtype=p.dtype, device=p.device)
    padded[:, 1 : 1 + seen[0]] = p
    scores = padded.unfold(1, ratio + 1, ratio).amax(-1)
    block = torch.arange(own + 1, device=p.device)
    return scores.masked_fill((block < spec.init_blocks) | (own - block <= spec.window_blocks), math.inf)


def _compare(run: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Largest relative difference of output and gradients; the reference gets the same numbers in float64 on
    the CPU."""
    results = []
    for function, leaves in (
        (run, [x.clone().requires_grad_() for x in inputs]),
        (reference, [x.double().cpu().requires_grad_() for x in inputs]),
    ):
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.device)
        grads = torch.autograd.grad((out.double() * weights).sum(), leaves)
        results.append([x.detach().double().cpu() for x in (out, *grads)])
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(*results, strict=True)]
    return torch.stack(errors).max().item()  # NaN stays NaN


def _draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def _lightning(device: torch.device, dtype: torch.dtype, backend: Backend, shorten: int) -> float:
    decay = torch.tensor(alibi_slopes(3), dtype=torch.float64)
    tokens = 333 // shorten
    inputs = _draw(device, dtype, (2, tokens, 3, 48), (2, tokens, 3, 48), (2, tokens, 3, 40))
    return _compare(
        lambda q, k, v: lightning_attention(q, k, v, decay.to(device, torch.float32), backend=backend)[0],
        lambda q, k, v: lightning_attention(q, k, v, decay, backend="naive")[0],
        inputs,
    )


def _lists(q: Tensor, k: Tensor, backend: Backend) -> Tensor:
    return select_blocks(q, k, SPEC, backend=backend)


def _sparse(device: torch.device, dtype: torch.dtype, backend: Backend, shorten: int) -> float:
    tokens = 450 // shorten
    inputs = _draw(device, dtype, (1, tokens, 6, 60), (1, tokens, 2, 60), (1, tokens, 2, 60))
    blocks = _lists(inputs[0].double().cpu(), inputs[1].double().cpu(), "torch")
    return _compare(
        lambda q, k, v: sparse_attention(q, k, v, blocks.to(device), SPEC.block_size, backend=backend),
        lambda q, k, v: sparse_attention(q, k, v, blocks, SPEC.block_size, backend="naive"),
        inputs,
    )


def _selection(device: torch.device, dtype: torch.dtype, backend: Backend, shorten: int) -> float:
    tokens = 1100 // shorten
    q, k = _draw(device, dtype, (1, tokens, 4, 64), (1, tokens, 2, 64))
    return check_lists(q, k, _lists(q, k, backend), SPEC, range(0, tokens, 11))


def _norm_rope(device: torch.device, dtype: torch.dtype, backend: Backend, shorten: int) -> float:
    tokens = 77 // shorten
    angles = torch.rand(1, tokens, 30) * 6.28
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    inputs = _draw(device, dtype, (2, tokens, 3, 60), (60,))
    return _compare(
        lambda x, w: norm_rope(x, w, cos, sin, 1e-6, backend=backend),
        lambda x, w: norm_rope(x, w, cos.double().cpu(), sin.double().cpu(), 1e-6, backend="naive"),
        inputs,
    )


def _norm_gate(device: torch.device, dtype: torch.dtype, backend: Backend, shorten: int) -> float:
    tokens = 77 // shorten
    inputs = _draw(device, dtype, (2, tokens, 300), (300,), (2, tokens, 300))
    return _compare(
        lambda x, w, g: norm_gate(x, w, g, 1e-6, backend=backend),
        lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="naive"),
        inputs,
    )
