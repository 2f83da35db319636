"""The ops timed: each against its baselines on the same tensors, with rows for the report and seconds for the
targets.

Shapes: B = 1 row, T tokens, Hq query heads, Hkv kv heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import (
    BlockSpec,
    alibi_slopes,
    extend_compressed,
    lightning_attention,
    norm_gate,
    norm_rope,
    select_blocks,
    sparse_attention,
)
from ..ops.backends import Backend, use_backend
from ..ops.sparse import num_windows
from . import baselines, counts
from .record import Report
from .timing import Timing, Work, take_turns

NAIVE_TOKENS = 1024  # the reference implementations are for reading, not for running


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    spec: BlockSpec = BlockSpec()

    def __str__(self) -> str:
        return (
            f"T={self.tokens} Hq={self.heads} Hkv={self.kv_heads} D={self.dim} "
            f"blocks={self.spec.num_blocks}x{self.spec.block_size}"
        )

    def draw(self, device: torch.device, heads: int | None = None) -> list[Tensor]:
        """q, k, v of random numbers, `[1, T, H, D]`."""
        return [
            torch.randn(1, self.tokens, heads or h, self.dim, device=device, dtype=torch.float32).to(
                self.dtype
            )
            for h in (self.heads, self.kv_heads, self.kv_heads)
        ]


def time_lightning(
    report: Report, shape: Shape, best: Backend, hidden: int, budget: float
) -> tuple[float, float, float]:
    """Forward and backward of Lightning attention beside the layer's five projections; returns the three
    medians."""
    report.say(f"lightning_attention, {shape.tokens:,} tokens, {shape.heads} heads x {shape.dim}")
    device, heads, dim, tokens = report.device, shape.heads, shape.dim, shape.tokens
    q, k, v = shape.draw(device, heads)
    decay = torch.tensor(alibi_slopes(heads), device=device)
    x = torch.randn(tokens, hidden, device=device).to(shape.dtype)
    projections = [
        nn.Linear(hidden, heads * dim, bias=False, device=device, dtype=shape.dtype) for _ in range(4)
    ]
    last = nn.Linear(heads * dim, hidden, bias=False, device=device, dtype=shape.dtype)

    def project() -> None:
        with torch.no_grad():
            last([p(x) for p in projections][-1])

    works: dict[str, Work] = {
        best: lambda: lightning_attention(q, k, v, decay, backend=best),
        "projections": project,
    }
    if best != "torch":
        works["torch"] = lambda: lightning_attention(q, k, v, decay, backend="torch")
    timings = take_turns(works, device, budget)
    flops, moved = (
        counts.lightning_flops(tokens, heads, dim, dim),
        counts.lightning_bytes(tokens, heads, dim, q.element_size()),
    )
    for name, timing in timings.items():
        if name == "projections":
            report.add(
                "five projections",
                "torch",
                timing,
                shape=f"T={tokens} {hidden}x{heads * dim}",
                dtype=shape.dtype,
                flops=10.0 * tokens * hidden * heads * dim,
            )
        else:
            report.add(
                "lightning_attention",
                name,
                timing,
                shape=f"T={tokens} H={heads} D={dim}",
                dtype=shape.dtype,
                flops=flops,
                moved=moved,
            )
    backward = _time_backward(
        report,
        "lightning_attention",
        best,
        shape,
        lambda q, k, v: lightning_attention(q, k, v, decay, backend=best)[0],
        [q, k, v],
        budget / 2,
        2.5 * flops,
    )
    a, b, c = (y[:, :NAIVE_TOKENS] for y in (q, k, v))
    slow = take_turns(
        {"naive": partial(lightning_attention, a, b, c, decay, backend="naive")}, device, 1.0, most=3
    )["naive"]
    report.add(
        "lightning_attention",
        "naive",
        slow,
        shape=f"T={min(NAIVE_TOKENS, tokens)} H={heads} D={dim}",
        dtype=shape.dtype,
    )
    return timings[best].p50, timings["projections"].p50, backward


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _time_backward(
    report: Report,
    op: str,
    backend: str,
    shape: Shape,
    run: Callable[..., Tensor],
    inputs: list[Tensor],
    budget: float,
    flops: float,
) -> float:
    """Median of the backward pass alone: the graph is made once and kept."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = run(*leaves)
    grad = torch.randn_like(out)
    timing = take_turns(
        {"backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)}, report.device, budget
    )["backward"]
    report.add(op, backend, timing, shape=str(shape), dtype=shape.dtype, kind="backward", flops=flops)
    return timing.p50


@dataclass(frozen=True)
class SparseSeconds:
    """Medians of the parts of block-sparse attention and of dense attention on the same tensors."""

    select: float
    attend: float
    dense: float
    backward: float | None

    @property
    def speedup(self) -> float:
        return self.dense / (self.select + self.attend)


@torch.no_grad()
def time_sparse(
    report: Report, shape: Shape, best: Backend, budget: float, backward: bool, dense_most: int = 20
) -> SparseSeconds:
    """Selection and attention over the selected blocks, beside dense attention."""
    report.say(
        f"select_blocks and sparse_attention, {shape.tokens:,} tokens, {shape.heads}/{shape.kv_heads} "
        f"heads x {shape.dim}, "
        f"{shape.spec.num_blocks} blocks"
    )
    device, spec, size = report.device, shape.spec, shape.spec.block_size
    q, k, v = shape.draw(device)
    blocks = select_blocks(q, k, spec, backend=best)
    check_rows(q, k, v, blocks, size, sparse_attention(q, k, v, blocks, size, backend=best))
    works: dict[str, Work] = {
        "select_blocks": lambda: select_blocks(q, k, spec, backend=best),
        "sparse_attention": lambda: sparse_attention(q, k, v, blocks, size, backend=best),
    }
    ours = take_turns(works, device, budget, least=2)
    report.add(
        "select_blocks",
        best,
        ours["select_blocks"],
        shape=str(shape),
        dtype=shape.dtype,
        flops=counts.selection_flops(shape.tokens, shape.heads, shape.dim, spec),
    )
    flops = counts.sparse_flops(shape.tokens, shape.heads, shape.dim, spec)
    report.add(
        "sparse_attention", best, ours["sparse_attention"], shape=str(shape), dtype=shape.dtype, flops=flops
    )
    dense = _time_dense(report, shape, q, k, v, budget, dense_most)
    back = None
    if backward:
        back = _time_backward(
            report,
            "sparse_attention",
            best,
            shape,
            lambda q, k, v: sparse_attention(q, k, v, blocks, size, backend=best),
            [q, k, v],
            budget,
            2.5 * flops,
        )
    return SparseSeconds(ours["select_blocks"].p50, ours["sparse_attention"].p50, dense, back)


def check_rows(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, out: Tensor) -> None:
    """A few rows of the output against the reference implementation in float64, at the size that is timed."""
    tolerance = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[q.dtype]
    for end in {1, min(65, q.shape[1]), q.shape[1] // 2 + 1, q.shape[1]}:
        row = slice(end - 1, end)
        wanted = sparse_attention(
            q[:, row].double().cpu(),
            k[:, :end].double().cpu(),
            v[:, :end].double().cpu(),
            blocks[:, row].cpu(),
            size,
            backend="naive",
        )
        error = (out[:, row].double().cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        if not error < tolerance:
            raise ValueError(
                f"sparse_attention is not timed: at token {end} of {q.shape[1]} it differs from the plain "
                f"statement by {error:.1e}"
            )


def _time_dense(
    report: Report, shape: Shape, q: Tensor, k: Tensor, v: Tensor, budget: float, most: int
) -> float:
    """Torch's own choice among its forms of dense attention; its median."""
    works: dict[str, Work] = {"": lambda: baselines.dense_attention(q, k, v)}
    timing = take_turns(works, report.device, budget, most=most)[""]
    report.add(
        "scaled_dot_product_attention",
        "torch's choice",
        timing,
        shape=str(shape),
        dtype=shape.dtype,
        flops=counts.dense_flops(shape.tokens, shape.heads, shape.dim),
    )
    return timing.p50


@torch.no_grad()
def time_other_forms(report: Report, shape: Shape, backends: list[Backend], budget: float) -> None:
    """Selection and attention in the slower forms, for comparison: `torch` in chunks, and `naive` on a short
    call."""
    q, k, v = shape.draw(report.device)
    for backend in backends:
        tokens = min(NAIVE_TOKENS, shape.tokens) if backend == "naive" else shape.tokens
        a, b, c = (x[:, :tokens] for x in (q, k, v))
        blocks = select_blocks(a, b, shape.spec, backend=backend)
        timings = take_turns(
            {
                "select_blocks": partial(select_blocks, a, b, shape.spec, backend=backend),
                "sparse_attention": partial(
                    sparse_attention, a, b, c, blocks, shape.spec.block_size, backend=backend
                ),
            },
            report.device,
            budget,
            most=5,
        )
        for op, timing in timings.items():
            report.add(
                op,
                backend,
                timing,
                shape=str(shape).replace(f"T={shape.tokens}", f"T={tokens}"),
                dtype=shape.dtype,
            )


@torch.no_grad()
def time_searches(report: Report, shape: Shape, budget: float) -> None:
    """Exact against hierarchical selection."""
    q, k, _ = shape.draw(report.device)
    timings = take_turns(
        {
            search: partial(select_blocks, q, k, shape.spec, search=search)
            for search in ("exact", "hierarchical")
        },
        report.device,
        budget,
    )
    for search, timing in timings.items():
        report.add("select_blocks", f"{search} search", timing, shape=str(shape), dtype=shape.dtype)


@torch.no_grad()
def time_fused(report: Report, shape: Shape, best: Backend, budget: float) -> None:
    """Norm with rotary positions and norm with gate, in one pass and in PyTorch's several."""
    x = torch.randn(1, shape.tokens, shape.heads, shape.dim, device=report.device).to(shape.dtype)
    weight = torch.ones(shape.dim, device=report.device, dtype=shape.dtype)
    angles = torch.rand(1, shape.tokens, shape.dim // 2, device=report.device)
    cos, sin, flat = angles.cos(), angles.sin(), x.flatten(2)
    wide, gate = torch.ones(flat.shape[-1], device=report.device, dtype=shape.dtype), torch.randn_like(flat)
    forms = {
        "norm_rope": partial(norm_rope, x, weight, cos, sin, 1e-6),
        "norm_gate": partial(norm_gate, flat, wide, gate, 1e-6),
    }
    for op, form in forms.items():
        moved = (2 if op == "norm_rope" else 3) * x.nbytes
        timings = take_turns(
            {b: partial(form, backend=b) for b in dict.fromkeys((best, "torch"))}, report.device, budget
        )
        for backend, timing in timings.items():
            report.add(
                op,
                backend,
                timing,
                shape=f"T={shape.tokens} W={flat.shape[-1]}",
                dtype=shape.dtype,
                moved=moved,
            )


@torch.no_grad()
def time_decode(report: Report, shape: Shape, best: Backend, lengths: tuple[int, ...], budget: float) -> None:
    """One token against caches of several lengths: new compressed keys, selection, attention; and a Lightning
    step."""
    device, spec = report.device, shape.spec
    works: dict[str, Work] = {}
    for length in lengths:
        k, v = (
            torch.randn(1, length, shape.kv_heads, shape.dim, device=device).to(shape.dtype) for _ in range(2)
        )
        levels = [
            torch.empty(
                1, num_windows(length, a, b), shape.kv_heads, shape.dim, device=device, dtype=shape.dtype
            )
            for a, b in ((spec.kernel_size, spec.kernel_stride), (spec.coarse_size, spec.coarse_stride))
        ]
        q = torch.randn(1, 1, shape.heads, shape.dim, device=device).to(shape.dtype)
        for level, a, b in zip(
            levels,
            (spec.kernel_size, spec.coarse_size),
            (spec.kernel_stride, spec.coarse_stride),
            strict=True,
        ):
            extend_compressed(k, level, 0, length, a, b)

        def step(
            k: Tensor = k, v: Tensor = v, q: Tensor = q, levels: list[Tensor] = levels, length: int = length
        ) -> None:
            extend_compressed(k, levels[0], length - 1, 1, spec.kernel_size, spec.kernel_stride)
            extend_compressed(k, levels[1], length - 1, 1, spec.coarse_size, spec.coarse_stride)
            blocks = select_blocks(q, k, spec, compressed=(levels[0], levels[1]))
            sparse_attention(q, k, v, blocks, spec.block_size)

        works[f"T={length}"] = step
    with use_backend(best):
        timings = take_turns(works, device, budget, most=300)
        for name, timing in timings.items():
            report.add(
                "sparse step",
                best,
                timing,
                shape=str(shape).replace(f"T={shape.tokens}", name),
                dtype=shape.dtype,
                kind="decode",
            )
        report.add(
            "lightning_attention",
            best,
            _time_lightning_step(report, shape, budget),
            kind="decode",
            dtype=shape.dtype,
            shape=f"T=1 H={shape.heads} D={shape.dim}",
        )


def _time_lightning_step(report: Report, shape: Shape, budget: float) -> Timing:
    q, k, v = (
        torch.randn(1, 1, shape.heads, shape.dim, device=report.device).to(shape.dtype) for _ in range(3)
    )
    state = torch.randn(1, shape.heads, shape.dim, shape.dim, device=report.device)
    decay = torch.tensor(alibi_slopes(shape.heads), device=report.device)
    work = partial(lightning_attention, q, k, v, decay, initial_state=state)
    return take_turns({"step": work}, report.device, budget, most=300)["step"]
