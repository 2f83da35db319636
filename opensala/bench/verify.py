"""No figure without a right answer: every op, in every backend to be timed, against its reference
implementation in float64.

Outputs and gradients on odd shapes, fresh random inputs at each call. The test suite does this far more
thoroughly; here it guards the very process, machine and versions that are about to be timed.
"""

from collections.abc import Callable

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

SPEC = BlockSpec(window_size=128, topk=5)
# Largest difference over the largest element wanted, outputs and gradients.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
AGREE = 0.99  # of selected lists: float32 scores turn a few near-ties round


def verify_ops(device: torch.device, dtype: torch.dtype, backends: tuple[Backend, ...]) -> list[str]:
    """Run all checks; returns one line for each op and backend.

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
            error = check(device, dtype, backend)
            if not error < TOLERANCE[dtype]:
                raise ValueError(
                    f"{name} is not timed: with backend {backend!r} in {dtype} it differs from the plain "
                    f"statement by {error:.1e}, allowed are {TOLERANCE[dtype]:.0e}"
                )
            lines.append(f"{name}, {backend}: outputs and gradients within {error:.1e} of float64")
        agreement = _selection(device, dtype, backend)
        if agreement < AGREE:
            raise ValueError(
                f"select_blocks is not timed: with backend {backend!r} only {agreement:.3f} of its lists "
                "are those of "
                f"the reference implementation, at least {AGREE} are asked for"
            )
        lines.append(f"select_blocks, {backend}: {agreement:.4f} of the lists are those of float64")
    return lines


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


def _lightning(device: torch.device, dtype: torch.dtype, backend: Backend) -> float:
    decay = torch.tensor(alibi_slopes(3), dtype=torch.float64)
    inputs = _draw(device, dtype, (2, 333, 3, 48), (2, 333, 3, 48), (2, 333, 3, 40))
    return _compare(
        lambda q, k, v: lightning_attention(q, k, v, decay.to(device, torch.float32), backend=backend)[0],
        lambda q, k, v: lightning_attention(q, k, v, decay, backend="naive")[0],
        inputs,
    )


def _lists(q: Tensor, k: Tensor, backend: Backend) -> Tensor:
    return select_blocks(q, k, SPEC, backend=backend)


def _sparse(device: torch.device, dtype: torch.dtype, backend: Backend) -> float:
    inputs = _draw(device, dtype, (1, 450, 6, 60), (1, 450, 2, 60), (1, 450, 2, 60))
    blocks = _lists(inputs[0].double().cpu(), inputs[1].double().cpu(), "torch")
    return _compare(
        lambda q, k, v: sparse_attention(q, k, v, blocks.to(device), SPEC.block_size, backend=backend),
        lambda q, k, v: sparse_attention(q, k, v, blocks, SPEC.block_size, backend="naive"),
        inputs,
    )


def _selection(device: torch.device, dtype: torch.dtype, backend: Backend) -> float:
    q, k = _draw(device, dtype, (1, 1100, 4, 64), (1, 1100, 2, 64))
    got = _lists(q, k, backend).cpu()
    wanted = _lists(q.double().cpu(), k.double().cpu(), "torch")
    return (got == wanted).all(-1).double().mean().item()


def _norm_rope(device: torch.device, dtype: torch.dtype, backend: Backend) -> float:
    angles = torch.rand(1, 77, 30) * 6.28
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    inputs = _draw(device, dtype, (2, 77, 3, 60), (60,))
    return _compare(
        lambda x, w: norm_rope(x, w, cos, sin, 1e-6, backend=backend),
        lambda x, w: norm_rope(x, w, cos.double().cpu(), sin.double().cpu(), 1e-6, backend="naive"),
        inputs,
    )


def _norm_gate(device: torch.device, dtype: torch.dtype, backend: Backend) -> float:
    inputs = _draw(device, dtype, (2, 77, 300), (300,), (2, 77, 300))
    return _compare(
        lambda x, w, g: norm_gate(x, w, g, 1e-6, backend=backend),
        lambda x, w, g: norm_gate(x, w, g, 1e-6, backend="naive"),
        inputs,
    )
